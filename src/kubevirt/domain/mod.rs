//! The edit of a libvirt domain: a value in, a value out.
//!
//! libvirt has no element for a vhost-user vsock (its `<vsock>` is the kernel's vhost-vsock), so the device comes in by
//! `<qemu:commandline>`, which libvirt hands to QEMU as it is. And guest memory has to be shared: QEMU starts without, and the
//! device fails only when the guest's driver does.
//!
//! # Theory of operation
//!
//! `scan` reads the document once, event by event, and notes *where* what we care about stands. [`edit`] compares that with what is
//! needed and lists edits, each a range of bytes and what replaces it. `splice` carries them out. So:
//!
//! 1. Bytes that no edit names come out as they came in: comments, CDATA, quoting, white space, elements nobody knew of.
//! 2. A document that has all that is needed has no edits: applying twice is applying once.
//! 3. What cannot be read for certain is refused. A document type declaration is, and with it every entity but XML's own five;
//!    size, depth and the length of a tag are bounded ([`MAX_LENGTH`], [`MAX_DEPTH`], [`MAX_TAG`], [`MAX_ATTRIBUTES`]).
//! 4. What would not work, or would change what somebody asked for on purpose, is refused ([`Conflict`]) rather than overruled.

mod arguments;
mod scan;
mod splice;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use arguments::CommandLine;
use scan::Layout;
use splice::Edits;

/// Bytes of a domain that is read. KubeVirt's are a few dozen KiB; gRPC of Go sends 4 MiB at most.
pub const MAX_LENGTH: usize = 4 * 1024 * 1024;
/// Elements within elements, as libxml2 has it (XML_PARSE_HUGE not given), which reads the document after us.
pub const MAX_DEPTH: usize = 256;
/// Bytes of one tag. Arguments of QEMU can be long.
pub const MAX_TAG: usize = 64 * 1024;
/// Attributes of one tag: to see that none stands twice takes the square of their number.
pub const MAX_ATTRIBUTES: usize = 128;
/// The namespace of `<qemu:commandline>` (libvirt: docs/drvqemu.rst).
const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";

/// Id of the character device in QEMU, by which a domain that was edited is known.
pub const CHARDEV_ID: &str = "vsocksidecar0";
/// Id of the vsock device in QEMU.
pub const DEVICE_ID: &str = "vsocksidecar0-dev";
/// Length of a unix socket's path that QEMU can connect to (unix(7)).
const MAX_SOCKET: usize = 107;

/// Why a domain was not edited.
#[derive(Debug, thiserror::Error)]
#[cfg_attr(test, derive(PartialEq))]
pub enum DomainError {
    /// Longer than [`MAX_LENGTH`].
    #[error("the domain is {length} bytes long, more than {MAX_LENGTH} are not read")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// Not UTF-8.
    #[error("the domain is not in UTF-8")]
    NotUtf8,
    /// No well-formed XML, or more of it than is read.
    #[error("the domain is no XML that can be read: line {line}: {why}")]
    Malformed {
        /// Line, from 1.
        line: usize,
        /// What is wrong there.
        why: String,
    },
    /// Well-formed, but no domain of QEMU.
    #[error("this is no domain of QEMU: {found}")]
    NotADomain {
        /// What it is.
        found: String,
    },
    /// A domain in which the device has no place as it is.
    #[error(transparent)]
    Conflict(#[from] Conflict),
}

/// What in a domain is in the way of the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// Another vsock in `<devices>`.
    #[error(
        "the domain has a <vsock> of the kernel already, and a guest takes one vsock: \
         remove autoattachVSOCK from the VirtualMachineInstance"
    )]
    Vsock,
    /// Another vsock among QEMU's arguments.
    #[error(
        "the domain has another vsock device among QEMU's arguments ({argument}), and a guest takes one: remove it"
    )]
    VsockArgument {
        /// The argument.
        argument: String,
    },
    /// Our chardev leads elsewhere.
    #[error(
        "the domain has a chardev {CHARDEV_ID} already, for {found} and not {wanted}: \
         two plugins or hooks add a vsock-sidecar, remove one"
    )]
    OtherSocket {
        /// Where it leads.
        found: String,
        /// Where it should.
        wanted: String,
    },
    /// One of the two arguments is there without the other.
    #[error("the domain has {there} and not {missing}: somebody has edited half of it, remove what is there")]
    Half {
        /// What is there.
        there: String,
        /// What is not.
        missing: String,
    },
    /// An option of QEMU is the last argument, and takes a value.
    #[error("the last of QEMU's arguments, {option}, lacks its value: complete or remove it")]
    NoValue {
        /// The option.
        option: String,
    },
    /// Memory of a kind that cannot be shared.
    #[error("guest memory must be shared with the sidecar, and {what}: {remedy}")]
    Memory {
        /// What is in the way.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// QEMU has no such device for this machine.
    #[error("QEMU has no vhost-user vsock for {arch}, whose devices are on no PCI bus")]
    Architecture {
        /// The architecture.
        arch: String,
    },
    /// An element stands twice that may stand once.
    #[error("line {line}: a second <{element}>, and libvirt heeds one only: leave one of them")]
    Twice {
        /// Its name.
        element: &'static str,
        /// Where the second is.
        line: usize,
    },
}

/// Why a [`Device`] cannot be described to QEMU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The path will not do.
    #[error("the socket's path {path} {why}", path = path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The PCI bus or address will not do.
    #[error("{value:?} is no {what} of QEMU, as {example} is")]
    Slot {
        /// What was given.
        value: String,
        /// Bus or address.
        what: &'static str,
        /// A right one.
        example: &'static str,
    },
}

/// The device that a domain gets: `vhost-user-vsock-pci-non-transitional` on a socket.
///
/// Without `reconnect`: with it QEMU does not start (docs/kubevirt.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    socket: String,
    bus: Option<String>,
    address: Option<String>,
}

impl Device {
    /// A device whose sidecar listens at `socket`, as QEMU sees that path.
    pub fn at(socket: &Path) -> Result<Device, DeviceError> {
        let refuse = |why| DeviceError::Socket {
            path: socket.to_owned(),
            why,
        };
        let text = socket.to_str().ok_or_else(|| refuse("is not in UTF-8"))?;
        if !socket.is_absolute() {
            return Err(refuse("is not absolute"));
        }
        if text.len() > MAX_SOCKET {
            return Err(refuse("is longer than the 107 bytes that the kernel takes"));
        }
        // Neither XML 1.0 nor a log has a place for these.
        if text
            .chars()
            .any(|c| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'))
        {
            return Err(refuse("has control characters"));
        }
        Ok(Device {
            socket: text.to_owned(),
            bus: None,
            address: None,
        })
    }

    /// The same on the PCI bus `bus` (`pcie.0`) rather than the first.
    pub fn on_bus(self, bus: &str) -> Result<Device, DeviceError> {
        let is_right = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if bus.is_empty() || bus.len() > 64 || !bus.chars().all(is_right) {
            return Err(DeviceError::Slot {
                value: bus.to_owned(),
                what: "PCI bus",
                example: "pcie.0",
            });
        }
        let bus = Some(bus.to_owned());
        Ok(Device { bus, ..self })
    }

    /// The same at the PCI address `address` (slot and perhaps function: `0x10`, `10.1`) rather than the first that is free.
    pub fn with_address(self, address: &str) -> Result<Device, DeviceError> {
        let (slot, function) = address.split_once('.').unwrap_or((address, "0"));
        let digits = slot.strip_prefix("0x").unwrap_or(slot);
        let slot = u8::from_str_radix(digits, 16).ok().filter(|slot| *slot < 32);
        let function = function.parse::<u8>().ok().filter(|function| *function < 8);
        let signs = address.contains(['+', '-']);
        if slot.is_none() || function.is_none() || signs {
            return Err(DeviceError::Slot {
                value: address.to_owned(),
                what: "PCI address",
                example: "0x10",
            });
        }
        let address = Some(address.to_owned());
        Ok(Device { address, ..self })
    }

    /// The socket's path, as QEMU sees it.
    pub fn socket(&self) -> &str {
        &self.socket
    }

    /// QEMU's arguments.
    pub fn arguments(&self) -> [String; 4] {
        // QEMU's options end at a comma, and a comma within one is written twice (QEMU: util/qemu-option.c).
        let chardev = format!("socket,id={CHARDEV_ID},path={}", self.socket.replace(',', ",,"));
        let mut device = format!("vhost-user-vsock-pci-non-transitional,id={DEVICE_ID},chardev={CHARDEV_ID}");
        for (key, value) in [("bus", &self.bus), ("addr", &self.address)] {
            if let Some(value) = value {
                device = format!("{device},{key}={value}");
            }
        }
        ["-chardev".to_owned(), chardev, "-device".to_owned(), device]
    }
}

/// Gives the domain `xml` the device and shared memory; what is there already stays as it is.
///
/// Borrowed if nothing was to do.
pub fn edit<'a>(xml: &'a [u8], device: &Device) -> Result<Cow<'a, str>, DomainError> {
    if xml.len() > MAX_LENGTH {
        return Err(DomainError::TooLong { length: xml.len() });
    }
    let xml = std::str::from_utf8(xml).map_err(|_| DomainError::NotUtf8)?;
    let layout = scan::scan(xml)?;
    let mut edits = Edits::of(xml);
    let mut blocks = Vec::new();
    share_memory(&layout, &mut edits, &mut blocks)?;
    add_device(&layout, device, &mut edits, &mut blocks)?;
    edits.append(&layout.root, &blocks);
    Ok(edits.apply())
}

/// An element to add: its own line, or a start tag, children and an end tag.
enum Block {
    Line(String),
    Nest(String, Vec<String>, String),
}

fn share_memory(layout: &Layout<'_>, edits: &mut Edits<'_>, blocks: &mut Vec<Block>) -> Result<(), Conflict> {
    const SOURCE: &str = "<source type='memfd'/>";
    const ACCESS: &str = "<access mode='shared'/>";

    for memory in &layout.nvdimms {
        // It was private so that what the guest writes stays out of the file.
        if memory.as_ref().is_some_and(|access| access.value == "private") {
            return Err(Conflict::Memory {
                what: "an nvdimm of the domain has access='private'".to_owned(),
                remedy: "share it or remove it",
            });
        }
    }
    for access in &layout.memory_access {
        if access.value == "private" {
            edits.replace(access.span.clone(), "shared");
        }
    }
    let Some(backing) = &layout.memory_backing else {
        let children = vec![SOURCE.to_owned(), ACCESS.to_owned()];
        blocks.push(Block::Nest(
            "<memoryBacking>".to_owned(),
            children,
            "</memoryBacking>".to_owned(),
        ));
        return Ok(());
    };
    let mut missing = Vec::new();
    match &layout.source {
        None => missing.push(Block::Line(SOURCE.to_owned())),
        Some(source) => match source.attribute.as_ref().map(|kind| (kind, kind.value.as_str())) {
            // Pages of a file are shared as well, be it hugetlbfs or a directory of qemu.conf.
            Some((_, "memfd" | "file")) => {}
            Some((kind, "anonymous")) => edits.replace(kind.span.clone(), "memfd"),
            None => edits.add_attribute(&source.element, "type", "memfd"),
            Some((_, other)) => {
                return Err(Conflict::Memory {
                    what: format!("nothing is known of memory whose <source> is of type {other:?}"),
                    remedy: "use memfd",
                });
            }
        },
    }
    match &layout.access {
        None => missing.push(Block::Line(ACCESS.to_owned())),
        Some(access) => match access.attribute.as_ref().map(|mode| (mode, mode.value.as_str())) {
            Some((_, "shared")) => {}
            Some((mode, "private")) => edits.replace(mode.span.clone(), "shared"),
            None => edits.add_attribute(&access.element, "mode", "shared"),
            Some((_, other)) => {
                return Err(Conflict::Memory {
                    what: format!("nothing is known of memory whose <access> has mode {other:?}"),
                    remedy: "use shared",
                });
            }
        },
    }
    edits.append(backing, &missing);
    Ok(())
}

fn add_device(
    layout: &Layout<'_>,
    device: &Device,
    edits: &mut Edits<'_>,
    blocks: &mut Vec<Block>,
) -> Result<(), Conflict> {
    if layout.has_vsock {
        return Err(Conflict::Vsock);
    }
    if let Some(arch) = layout.arch.as_deref().filter(|arch| arch.starts_with("s390")) {
        return Err(Conflict::Architecture {
            arch: arch.to_owned(),
        });
    }
    if CommandLine::of(&layout.arguments)?.has(device)? {
        return Ok(());
    }
    let lines = |prefix: &str| -> Vec<String> {
        let colon = if prefix.is_empty() { "" } else { ":" };
        let argument = |value: &String| format!("<{prefix}{colon}arg value='{}'/>", splice::escape(value));
        device.arguments().iter().map(argument).collect()
    };
    if let Some(command_line) = &layout.command_line {
        let added: Vec<Block> = lines(command_line.prefix())
            .into_iter()
            .map(Block::Line)
            .collect();
        edits.append(command_line, &added);
        return Ok(());
    }
    // The customary prefix, which KubeVirt declares for every domain; declared on the element itself if it is taken.
    let (prefix, declaration) = match &layout.qemu_prefix {
        Some(prefix) => (prefix.as_str(), String::new()),
        None if layout.binds_qemu => ("qemu", format!(" xmlns:qemu='{QEMU_NAMESPACE}'")),
        None => {
            edits.add_attribute(&layout.root, "xmlns:qemu", QEMU_NAMESPACE);
            ("qemu", String::new())
        }
    };
    blocks.push(Block::Nest(
        format!("<{prefix}:commandline{declaration}>"),
        lines(prefix),
        format!("</{prefix}:commandline>"),
    ));
    Ok(())
}
