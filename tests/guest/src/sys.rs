//! What only the kernel can do for an init program: mounts, modules, terminals, the end.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, delete_module, finit_module, reboot};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

const TRANSPORT: &str = "vmw_vsock_virtio_transport";
const DRIVER: &str = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport";

/// Mounts what a program may expect below the root.
pub fn mount_all() -> io::Result<()> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        mount(kind, target, kind, MountFlags::empty(), None)?;
    }
    Ok(())
}

/// Loads `/modules/NN-name.ko` in the order of NN.
pub fn load_modules() -> io::Result<()> {
    for path in module_files()? {
        load(&path)?;
    }
    Ok(())
}

/// Unloads the vsock transport and loads it again. The kernel refuses while a socket uses it.
pub fn reload_transport() -> io::Result<()> {
    delete_module(&CString::new(TRANSPORT)?, 0)?;
    let end = format!("-{TRANSPORT}.ko");
    match module_files()?
        .into_iter()
        .find(|path| path.to_string_lossy().ends_with(&end))
    {
        Some(path) => load(&path),
        None => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Takes the vsock device from its driver and gives it back: the device is reset, open sockets end, the system runs on.
pub fn rebind_transport() -> io::Result<()> {
    let device = vsock_device()?;
    let name = device.file_name().ok_or(io::ErrorKind::NotFound)?;
    fs::write(Path::new(DRIVER).join("unbind"), name.as_encoded_bytes())?;
    fs::write(Path::new(DRIVER).join("bind"), name.as_encoded_bytes())
}

/// The device that the vsock driver has: a directory whose name begins with `virtio`.
pub fn vsock_device() -> io::Result<PathBuf> {
    fs::read_dir(DRIVER)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"virtio"))
        })
        .ok_or(io::ErrorKind::NotFound.into())
}

/// The feature bits that the driver of a virtio device acknowledged. The file has a digit for each bit, 0 first
/// (`features_show` in Linux's drivers/virtio/virtio.c).
pub fn features(device: &Path) -> io::Result<u64> {
    let digits = fs::read_to_string(device.join("features"))?;
    let bits = digits.trim().bytes().zip(0..64);
    Ok(bits.fold(0, |bits, (digit, bit)| bits | u64::from(digit == b'1') << bit))
}

/// What the kernel does with the bus addresses of a virtio device's parent: `DMA` (an IOMMU, mappings end at once),
/// `DMA-FQ` (mappings end a little later), `identity` or `none` (no IOMMU).
pub fn iommu_domain(device: &Path) -> io::Result<String> {
    let device = fs::canonicalize(device)?;
    let group = device
        .parent()
        .ok_or(io::ErrorKind::NotFound)?
        .join("iommu_group");
    if !group.exists() {
        return Ok("none".to_owned());
    }
    Ok(fs::read_to_string(group.join("type"))?.trim().to_owned())
}

/// Opens a serial port without echo or line editing: bytes are bytes.
pub fn open_raw(path: &str) -> io::Result<File> {
    let port = OpenOptions::new().read(true).write(true).open(path)?;
    let mut settings = tcgetattr(&port)?;
    settings.make_raw();
    tcsetattr(&port, OptionalActions::Now, &settings)?;
    Ok(port)
}

/// The CID that the driver read from the device.
pub fn local_cid() -> io::Result<u32> {
    /// `IOCTL_VM_SOCKETS_GET_LOCAL_CID`, `_IO(7, 0xb9)` in Linux's include/uapi/linux/vm_sockets.h.
    const LOCAL_CID: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(7, 0xb9);
    let device = File::open("/dev/vsock")?;
    // SAFETY: the request writes one `unsigned int` through its argument (`vsock_dev_do_ioctl` in Linux's
    // net/vmw_vsock/af_vsock.c), which is what `Getter` with `u32` provides room for.
    let cid = unsafe { rustix::ioctl::ioctl(&device, rustix::ioctl::Getter::<LOCAL_CID, u32>::new())? };
    Ok(cid)
}

/// `struct ifreq` of Linux's include/uapi/linux/if.h: a name and a union of 24 bytes.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    value: [u8; 24],
}

/// Gives a network interface an IPv4 address, with the netmask of its class, and switches it on.
pub fn set_address(interface: &str, address: Ipv4Addr) -> io::Result<()> {
    const SET_FLAGS: rustix::ioctl::Opcode = 0x8914;
    const SET_ADDRESS: rustix::ioctl::Opcode = 0x8916;
    const AF_INET: u16 = 2;
    /// `IFF_UP`.
    const UP: u16 = 1;
    let request = |words: &[&[u8]]| {
        let (mut name, mut value) = ([0; 16], [0; 24]);
        // The last byte stays zero, as the end of the name.
        for (to, from) in name[..15].iter_mut().zip(interface.bytes()) {
            *to = from;
        }
        for (to, from) in value.iter_mut().zip(words.concat()) {
            *to = from;
        }
        InterfaceRequest { name, value }
    };
    let any = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // `struct sockaddr_in`: family, port, address.
    let place = request(&[&AF_INET.to_ne_bytes(), &[0; 2], &address.octets()]);
    // SAFETY: the request reads a `struct ifreq` (`devinet_ioctl` in Linux's net/ipv4/devinet.c), which has this layout.
    unsafe { rustix::ioctl::ioctl(&any, rustix::ioctl::Setter::<SET_ADDRESS, _>::new(place))? };
    let up = request(&[&UP.to_ne_bytes()]);
    // SAFETY: the request reads a `struct ifreq` (`dev_ioctl` in Linux's net/core/dev_ioctl.c), which has this layout.
    unsafe { rustix::ioctl::ioctl(&any, rustix::ioctl::Setter::<SET_FLAGS, _>::new(up))? };
    Ok(())
}

/// The release of the running kernel.
pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Writes the kernel's log to the console, which `quiet` kept it from.
pub fn dump_log() -> io::Result<()> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    const O_NONBLOCK: i32 = 0o4000;
    let mut log = OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open("/dev/kmsg")?;
    let mut console = OpenOptions::new().write(true).open("/dev/console")?;
    let mut record = [0; 8192];
    // One read is one record; EAGAIN is the end, EPIPE a record that was overwritten meanwhile.
    loop {
        match log.read(&mut record) {
            Ok(n) => console.write_all(&record[..n])?,
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
            Err(_) => return Ok(()),
        }
    }
}

/// Free memory as the kernel estimates it, in KiB.
pub fn available_memory() -> io::Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let value = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    value
        .and_then(|v| v.trim().strip_suffix(" kB")?.parse().ok())
        .ok_or(io::ErrorKind::InvalidData.into())
}

/// Switches the machine off.
pub fn power_off() -> io::Result<()> {
    Ok(reboot(RebootCommand::PowerOff)?)
}

fn module_files() -> io::Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir("/modules")?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    Ok(files)
}

fn load(path: &Path) -> io::Result<()> {
    finit_module(File::open(path)?, c"", 0)
        .map_err(|e| io::Error::other(format!("loading {}: {}", path.display(), io::Error::from(e))))
}
