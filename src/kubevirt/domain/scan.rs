//! Reads a domain once and notes where what matters stands.

use std::ops::Range;

use quick_xml::XmlVersion;
use quick_xml::events::{BytesDecl, BytesStart, Event};
use quick_xml::name::{Namespace, PrefixDeclaration, ResolveResult};
use quick_xml::reader::NsReader;

use super::{Conflict, DomainError, MAX_ATTRIBUTES, MAX_DEPTH, MAX_TAG, QEMU_NAMESPACE};

/// What an edit needs to know of a domain.
#[derive(Default, Debug)]
pub(super) struct Layout<'a> {
    pub(super) root: Element<'a>,
    /// A prefix that the root binds to QEMU's namespace.
    pub(super) qemu_prefix: Option<String>,
    /// Whether the root binds the prefix `qemu` to anything.
    pub(super) binds_qemu: bool,
    /// `memoryBacking`, and its children `source` and `access`.
    pub(super) memory_backing: Option<Element<'a>>,
    pub(super) source: Option<Choice<'a>>,
    pub(super) access: Option<Choice<'a>>,
    /// `memAccess` of NUMA cells and `access` of memory devices, where given.
    pub(super) memory_access: Vec<Attribute>,
    /// `access` of each nvdimm.
    pub(super) nvdimms: Vec<Option<Attribute>>,
    /// Whether there is a `vsock` in `devices`.
    pub(super) has_vsock: bool,
    /// `arch` of `os/type`.
    pub(super) arch: Option<String>,
    /// The last `qemu:commandline`.
    pub(super) command_line: Option<Element<'a>>,
    /// QEMU's arguments, of all of these.
    pub(super) arguments: Vec<String>,
}

/// Where an element stands.
#[derive(Clone, Default, Debug)]
pub(super) struct Element<'a> {
    /// As written, prefix included.
    pub(super) name: &'a str,
    /// Its start tag, from `<` to `>`.
    pub(super) start: Range<usize>,
    /// Whether this is an empty-element tag, `<a/>`.
    pub(super) is_empty: bool,
    /// Where its end tag begins, for elements that may get children; `None` if there is none.
    pub(super) end: Option<usize>,
}

impl Element<'_> {
    /// What stands before the colon of its name.
    pub(super) fn prefix(&self) -> &str {
        self.name.split_once(':').map_or("", |(prefix, _)| prefix)
    }
}

/// An element that says one thing by one attribute.
#[derive(Debug)]
pub(super) struct Choice<'a> {
    pub(super) element: Element<'a>,
    pub(super) attribute: Option<Attribute>,
}

/// Value of an attribute.
#[derive(Clone, Debug)]
pub(super) struct Attribute {
    /// Without references.
    pub(super) value: String,
    /// As written, between the quotes.
    pub(super) span: Range<usize>,
}

/// What an element is to us, which its parent decides with its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    Root,
    MemoryBacking,
    Source,
    Access,
    Cpu,
    Numa,
    Cell,
    Devices,
    Vsock,
    Memory,
    Os,
    OsType,
    CommandLine,
    Argument,
    /// What is inside of it does not matter.
    Other,
}

impl Role {
    fn of(parent: Option<Role>, namespace: Option<&str>, name: &str) -> Role {
        match (parent, namespace, name) {
            (None, None, "domain") => Role::Root,
            (Some(Role::Root), None, "memoryBacking") => Role::MemoryBacking,
            (Some(Role::MemoryBacking), None, "source") => Role::Source,
            (Some(Role::MemoryBacking), None, "access") => Role::Access,
            (Some(Role::Root), None, "cpu") => Role::Cpu,
            (Some(Role::Cpu), None, "numa") => Role::Numa,
            (Some(Role::Numa), None, "cell") => Role::Cell,
            (Some(Role::Root), None, "devices") => Role::Devices,
            (Some(Role::Devices), None, "vsock") => Role::Vsock,
            (Some(Role::Devices), None, "memory") => Role::Memory,
            (Some(Role::Root), None, "os") => Role::Os,
            (Some(Role::Os), None, "type") => Role::OsType,
            (Some(Role::Root), Some(QEMU_NAMESPACE), "commandline") => Role::CommandLine,
            (Some(Role::CommandLine), Some(QEMU_NAMESPACE), "arg") => Role::Argument,
            _ => Role::Other,
        }
    }
}

/// A byte order mark, which the reader takes off and does not count.
const BOM: char = '\u{feff}';

pub(super) fn scan(xml: &str) -> Result<Layout<'_>, DomainError> {
    let mut scanner = Scanner {
        xml,
        open: Vec::new(),
        layout: Layout::default(),
        has_root: false,
    };
    let body = xml.strip_prefix(BOM).unwrap_or(xml);
    let skipped = xml.len().saturating_sub(body.len());
    let mut reader = NsReader::from_str(body);
    reader.config_mut().enable_all_checks(true);
    let position = |offset: u64| {
        usize::try_from(offset)
            .unwrap_or(xml.len())
            .saturating_add(skipped)
    };
    let mut before = position(0);
    loop {
        let event = reader.read_event().map_err(|error| {
            let at = position(reader.error_position());
            scanner.malformed(at, error)
        })?;
        let span = before..position(reader.buffer_position());
        before = span.end;
        match event {
            Event::Start(tag) => {
                let namespace = namespace(&reader, &tag, &scanner, span.start)?;
                scanner.start(&tag, namespace, span, false)?;
            }
            Event::Empty(tag) => {
                let namespace = namespace(&reader, &tag, &scanner, span.start)?;
                scanner.start(&tag, namespace, span, true)?;
            }
            Event::End(_) => scanner.end(span.start),
            Event::Text(text) => {
                let visible = text.trim_start_matches([' ', '\t', '\r', '\n']);
                if scanner.open.is_empty() && !visible.is_empty() {
                    let at = span.end.saturating_sub(visible.len());
                    return Err(scanner.malformed(at, "text outside of the element <domain>"));
                }
            }
            Event::CData(_) if scanner.open.is_empty() => {
                return Err(scanner.malformed(span.start, "text outside of the element <domain>"));
            }
            Event::GeneralRef(reference) => {
                let is_known = match reference.resolve_char_ref() {
                    Ok(Some(_)) => true,
                    Ok(None) => matches!(&*reference, "lt" | "gt" | "amp" | "apos" | "quot"),
                    Err(_) => false,
                };
                if !is_known || scanner.open.is_empty() {
                    return Err(scanner.malformed(span.start, format!("unknown entity &{};", &*reference)));
                }
            }
            Event::DocType(_) => {
                let why = "a document type declaration, which no domain has and which could hide anything";
                return Err(scanner.malformed(span.start, why));
            }
            Event::Decl(declaration) => scanner.declaration(&declaration, span.start)?,
            Event::CData(_) | Event::Comment(_) | Event::PI(_) => {}
            Event::Eof => break,
        }
    }
    if let Some((_, start)) = scanner.open.last() {
        return Err(scanner.malformed(*start, "an element that is never closed"));
    }
    if !scanner.has_root {
        return Err(scanner.malformed(xml.len(), "there is no element"));
    }
    Ok(scanner.layout)
}

fn namespace(
    reader: &NsReader<&[u8]>,
    tag: &BytesStart<'_>,
    scanner: &Scanner<'_>,
    at: usize,
) -> Result<Option<String>, DomainError> {
    match reader.resolver().resolve_element(tag.name()).0 {
        ResolveResult::Unbound => Ok(None),
        ResolveResult::Bound(Namespace(name)) => Ok(Some(name.to_owned())),
        ResolveResult::Unknown(prefix) => {
            Err(scanner.malformed(at, format!("the prefix {prefix:?} is bound to no namespace")))
        }
    }
}

struct Scanner<'a> {
    xml: &'a str,
    /// Elements that are open, outermost first, each with where it starts.
    open: Vec<(Role, usize)>,
    layout: Layout<'a>,
    has_root: bool,
}

impl<'a> Scanner<'a> {
    fn start(
        &mut self,
        tag: &BytesStart<'_>,
        namespace: Option<String>,
        span: Range<usize>,
        is_empty: bool,
    ) -> Result<(), DomainError> {
        if span.len() > MAX_TAG {
            return Err(self.malformed(span.start, format!("a tag of more than {MAX_TAG} bytes")));
        }
        if self.open.len() >= MAX_DEPTH {
            return Err(self.malformed(
                span.start,
                format!("more than {MAX_DEPTH} elements within one another"),
            ));
        }
        if self.open.is_empty() && self.has_root {
            return Err(self.malformed(span.start, "a second element beside <domain>"));
        }
        let local = tag.local_name();
        let parent = self.open.last().map(|(role, _)| *role);
        let role = Role::of(parent, namespace.as_deref(), local.as_ref());
        let tag_name = tag.name();
        let name_start = span.start.saturating_add(1);
        let name_end = name_start.saturating_add(tag_name.as_ref().len());
        let element = Element {
            name: self.xml.get(name_start..name_end).unwrap_or_default(),
            start: span.clone(),
            is_empty,
            end: None,
        };
        if parent.is_none() {
            self.has_root = true;
            if role != Role::Root {
                return Err(DomainError::NotADomain {
                    found: format!("its element is <{}>", tag_name.as_ref()),
                });
            }
        }
        self.note(role, tag, element)?;
        if !is_empty {
            self.open.push((role, span.start));
        }
        Ok(())
    }

    fn note(&mut self, role: Role, tag: &BytesStart<'_>, element: Element<'a>) -> Result<(), DomainError> {
        let start = element.start.start;
        // All attributes of all elements: this is where their form is checked.
        let wanted = match role {
            Role::Root | Role::Source => "type",
            Role::Access => "mode",
            Role::Cell => "memAccess",
            Role::Memory => "access",
            Role::OsType => "arch",
            Role::Argument => "value",
            _ => "",
        };
        let mut found = None;
        let mut model = None;
        for (index, attribute) in tag.attributes().enumerate() {
            if index >= MAX_ATTRIBUTES {
                let why = format!("a tag of more than {MAX_ATTRIBUTES} attributes");
                return Err(self.malformed(start, why));
            }
            let attribute = attribute.map_err(|error| self.malformed(start, error))?;
            let value = attribute
                .normalized_value(XmlVersion::Implicit1_0)
                .map_err(|error| self.malformed(start, error))?;
            let key = attribute.key.as_ref();
            // The reader compares namespaces as they are written, and libvirt as they are meant.
            if attribute.key.as_namespace_binding().is_some() && attribute.value.contains('&') {
                return Err(self.malformed(
                    start,
                    format!("{key} has a reference, and namespaces are compared as written"),
                ));
            }
            if key == wanted {
                let span = self
                    .span_of(&attribute.value, &element.start)
                    .ok_or_else(|| self.malformed(start, format!("the attribute {key} cannot be located")))?;
                found = Some(Attribute {
                    value: value.into_owned(),
                    span,
                });
            } else if role == Role::Memory && key == "model" {
                model = Some(value.into_owned());
            } else if role == Role::Root
                && let Some(PrefixDeclaration::Named(prefix)) = attribute.key.as_namespace_binding()
            {
                self.layout.binds_qemu |= prefix == "qemu";
                let is_better = prefix == "qemu" || self.layout.qemu_prefix.is_none();
                if value == QEMU_NAMESPACE && is_better {
                    self.layout.qemu_prefix = Some(prefix.to_owned());
                }
            }
        }
        self.keep(role, element, found, model)
    }

    fn keep(
        &mut self,
        role: Role,
        element: Element<'a>,
        attribute: Option<Attribute>,
        model: Option<String>,
    ) -> Result<(), DomainError> {
        let start = element.start.start;
        let layout = &mut self.layout;
        match role {
            Role::Root => {
                layout.root = element;
                let kind = attribute.map_or_else(|| "no type".to_owned(), |kind| kind.value);
                if !matches!(kind.as_str(), "kvm" | "qemu" | "hvf" | "no type") {
                    let found = format!("its type is {kind:?}");
                    return Err(DomainError::NotADomain { found });
                }
            }
            Role::MemoryBacking if layout.memory_backing.is_some() => {
                return Err(self.twice("memoryBacking", start));
            }
            Role::MemoryBacking => layout.memory_backing = Some(element),
            Role::Source if layout.source.is_some() => return Err(self.twice("source", start)),
            Role::Source => layout.source = Some(Choice { element, attribute }),
            Role::Access if layout.access.is_some() => return Err(self.twice("access", start)),
            Role::Access => layout.access = Some(Choice { element, attribute }),
            Role::Memory if model.as_deref() == Some("nvdimm") => layout.nvdimms.push(attribute),
            Role::Cell | Role::Memory => layout.memory_access.extend(attribute),
            Role::Vsock => layout.has_vsock = true,
            Role::OsType => layout.arch = attribute.map(|arch| arch.value),
            Role::CommandLine => layout.command_line = Some(element),
            Role::Argument => layout
                .arguments
                .push(attribute.map(|value| value.value).unwrap_or_default()),
            Role::Cpu | Role::Numa | Role::Devices | Role::Os | Role::Other => {}
        }
        Ok(())
    }

    fn twice(&self, element: &'static str, at: usize) -> DomainError {
        let line = self.line(at);
        DomainError::Conflict(Conflict::Twice { element, line })
    }

    /// An end tag begins at `at`. The reader has held its name against the start tag's.
    fn end(&mut self, at: usize) {
        let Some((role, start)) = self.open.pop() else {
            return;
        };
        let element = match role {
            Role::Root => Some(&mut self.layout.root),
            Role::MemoryBacking => self.layout.memory_backing.as_mut(),
            Role::CommandLine => self.layout.command_line.as_mut(),
            _ => None,
        };
        if let Some(element) = element.filter(|element| element.start.start == start) {
            element.end = Some(at);
        }
    }

    fn declaration(&self, declaration: &BytesDecl<'_>, at: usize) -> Result<(), DomainError> {
        let version = declaration.version().map_err(|error| self.malformed(at, error))?;
        if version != "1.0" {
            return Err(self.malformed(at, format!("XML {version}, and libvirt reads 1.0")));
        }
        if let Some(encoding) = declaration.encoding() {
            let encoding = encoding.map_err(|error| self.malformed(at, error))?;
            if !["utf-8", "us-ascii"].contains(&encoding.to_ascii_lowercase().as_str()) {
                return Err(self.malformed(at, format!("the encoding {encoding}, use UTF-8")));
            }
        }
        Ok(())
    }

    /// Where the slice `value` is within the tag `tag` of the document: it was borrowed from there.
    fn span_of(&self, value: &str, tag: &Range<usize>) -> Option<Range<usize>> {
        let start = (value.as_ptr() as usize).checked_sub(self.xml.as_ptr() as usize)?;
        let span = start..start.checked_add(value.len())?;
        (tag.start < span.start && span.end < tag.end && self.xml.get(span.clone())? == value).then_some(span)
    }

    fn malformed(&self, at: usize, why: impl ToString) -> DomainError {
        DomainError::Malformed {
            line: self.line(at),
            why: why.to_string(),
        }
    }

    /// The number of the line, from 1. Counts from the start of the document: for errors only.
    fn line(&self, at: usize) -> usize {
        let before = self.xml.as_bytes().get(..at).unwrap_or(self.xml.as_bytes());
        before
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
            .saturating_add(1)
    }
}
