//! libvirt itself: its schema, and a domain that it starts with the sidecar's device, down to bytes through a guest's vsock.
//!
//! The driver runs inside of `virt-qemu-run` with a directory of its own, so there is no daemon and nothing in /etc.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vsock_sidecar::kubevirt::hook::messages::{
    Empty, InfoResult, OnDefineDomainParams, OnDefineDomainResult,
};

use super::support::*;
use super::vm::assets::assets;
use super::vm::qemu::die_with_us;
use super::vm::service::{Service, echo};

const SCHEMA: &str = "/usr/share/libvirt/schemas/domain.rng";
/// A boot without KVM on a loaded machine.
const BOOT: Duration = Duration::from_secs(180);

/// Whether the developer wants none of this.
pub fn is_left_out() -> bool {
    let left_out = std::env::var_os("VSOCK_TEST_NO_LIBVIRT").is_some();
    assert!(
        !left_out || std::env::var_os("CI").is_none(),
        "CI has libvirt: unset VSOCK_TEST_NO_LIBVIRT"
    );
    left_out
}

/// Holds a domain against libvirt's schema.
#[track_caller]
pub fn validate(file: &Path) {
    assert!(
        Path::new(SCHEMA).exists(),
        "{SCHEMA} is not there: run tests/kubevirt/setup.sh, or set VSOCK_TEST_NO_LIBVIRT=1"
    );
    let output = Command::new("xmllint")
        .args(["--noout", "--nonet", "--relaxng", SCHEMA])
        .arg(file)
        .output()
        .expect("xmllint, which tests/kubevirt/setup.sh installs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", file.display());
}

/// As little as a virtual machine has that KubeVirt's way of writing one down allows, with a kernel, and the control line of the
/// guest's program as its second serial port.
fn domain(dir: &Path, kernel: &Path) -> String {
    let dir = dir.display();
    format!(
        "<domain type=\"qemu\" xmlns:qemu=\"http://libvirt.org/schemas/domain/qemu/1.0\">
\t<name>vm</name>
\t<memory unit=\"b\">268435456</memory>
\t<vcpu placement=\"static\">1</vcpu>
\t<os>
\t\t<type arch=\"x86_64\" machine=\"q35\">hvm</type>
\t\t<kernel>{}</kernel>
\t\t<initrd>{dir}/initramfs</initrd>
\t\t<cmdline>console=ttyS0 quiet panic=0 nokaslr</cmdline>
\t</os>
\t<features>
\t\t<acpi></acpi>
\t</features>
\t<cpu mode=\"maximum\"></cpu>
\t<devices>
\t\t<emulator>/usr/bin/qemu-system-x86_64</emulator>
\t\t<controller type=\"usb\" index=\"0\" model=\"none\"></controller>
\t\t<memballoon model=\"none\"></memballoon>
\t\t<serial type=\"file\">
\t\t\t<source path=\"{dir}/console.log\"></source>
\t\t\t<target port=\"0\"></target>
\t\t</serial>
\t\t<serial type=\"unix\">
\t\t\t<source mode=\"connect\" path=\"{dir}/control.sock\"></source>
\t\t\t<target port=\"1\"></target>
\t\t</serial>
\t</devices>
\t<qemu:commandline>
\t\t<qemu:arg value=\"-fw_cfg\"></qemu:arg>
\t\t<qemu:arg value=\"name=opt/test,string=kept\"></qemu:arg>
\t</qemu:commandline>
</domain>
",
        kernel.display()
    )
}

/// libvirt's QEMU driver with one virtual machine, which ends with it.
struct Libvirt {
    child: Child,
    root: PathBuf,
}

impl Libvirt {
    fn run(root: PathBuf, domain: &Path) -> Libvirt {
        fs::create_dir_all(root.join("etc")).unwrap();
        // As who we are; nothing of a container's that we may not have.
        let settings = "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\n\
                        security_driver = \"none\"\nnamespaces = [ ]\ncgroup_controllers = [ ]\nstdio_handler = \"file\"\n";
        fs::write(root.join("etc/qemu.conf"), settings).unwrap();
        let log = fs::File::create(root.join("run.log")).unwrap();
        let child = die_with_us("virt-qemu-run")
            .arg("--root")
            .arg(&root)
            .arg(domain)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("virt-qemu-run, which tests/kubevirt/setup.sh installs, by setpriv");
        Libvirt { child, root }
    }

    fn logs(&self) -> String {
        let files = [self.root.join("run.log"), self.root.join("log/qemu/vm.log")];
        files
            .iter()
            .filter_map(|file| fs::read_to_string(file).ok())
            .collect()
    }

    /// Destroys the virtual machine, as `virsh destroy` does.
    fn stop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        until("libvirt's end", || self.child.try_wait().unwrap());
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- libvirt's logs:\n{}", self.logs());
        }
        // Not SIGKILL, at which the virtual machine would stay.
        self.stop();
    }
}

/// The guest's program.
struct Control {
    lines: BufReader<UnixStream>,
}

impl Control {
    fn accept(listener: &UnixListener, libvirt: &mut Libvirt) -> Control {
        listener.set_nonblocking(true).unwrap();
        let stream = until("QEMU connects the second serial port", || {
            if let Some(status) = libvirt.child.try_wait().unwrap() {
                panic!("libvirt has ended with {status}");
            }
            match listener.accept() {
                Ok((stream, _)) => Some(stream),
                Err(error) if error.kind() == ErrorKind::WouldBlock => None,
                Err(error) => panic!("{error}"),
            }
        });
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(BOOT)).unwrap();
        Control {
            lines: BufReader::new(stream),
        }
    }

    fn line(&mut self) -> String {
        let deadline = Instant::now() + BOOT;
        let mut line = String::new();
        while !line.ends_with('\n') {
            assert!(Instant::now() < deadline, "the guest says no more than {line:?}");
            let read = self.lines.read_line(&mut line).expect("the guest answers");
            assert_ne!(read, 0, "the guest is gone after {line:?}");
        }
        line.trim_end().to_owned()
    }

    fn ok(&mut self, command: &str) -> String {
        writeln!(self.lines.get_mut(), "{command}").unwrap();
        let answer = self.line();
        assert!(answer.starts_with("ok"), "{command}: {answer}");
        answer
    }
}

/// KubeVirt's part is played by the test: it asks the hook for the domain, has libvirt start it, and ends it as a pod ends.
#[test]
fn libvirt_starts_the_domain_and_its_guest_has_a_vsock() {
    if is_left_out() || std::env::var_os("VSOCK_TEST_NO_VM").is_some() {
        return;
    }
    let (mut pod, launcher) = (Pod::empty(), Launcher::new());
    let service = Service::unix(&pod.path("echo.sock"), echo());
    let rule = format!(
        "  outbound: [{{name: echo, port: 5000, to: \"unix://{}\"}}]\n",
        pod.path("echo.sock").display()
    );
    pod.spawn(&pod.configuration(&rule));
    launcher.collect(&mut pod);

    let assets = assets("6.1");
    fs::write(pod.path("initramfs"), &assets.initramfs).unwrap();
    let asked = OnDefineDomainParams {
        domain_xml: domain(pod.dir(), &assets.kernel).into(),
        vmi: b"{}".into(),
    };
    let answer: OnDefineDomainResult = launcher.call(&pod.hook(), DEFINE, asked).unwrap();
    let file = pod.path("domain.xml");
    fs::write(&file, &answer.domain_xml).unwrap();
    validate(&file);

    let listener = UnixListener::bind(pod.path("control.sock")).unwrap();
    let mut libvirt = Libvirt::run(pod.path("libvirt"), &file);
    let mut control = Control::accept(&listener, &mut libvirt);
    let ready = control.line();
    assert!(ready.starts_with("ready 6.1"), "{ready}");
    assert_eq!(control.ok("cid"), "ok cid=3");
    // The driver runs, so memory is shared; and bytes go both ways.
    let exchange = control.ok("client 5000 exchange:bytes=1000000,seed=7");
    assert!(exchange.contains("received=1000000"), "{exchange}");

    let log = libvirt.logs();
    for part in [
        "-fw_cfg name=opt/test,string=kept",
        "\"qom-type\":\"memory-backend-memfd\"",
        "\"share\":true",
        "vhost-user-vsock-pci-non-transitional,id=vsocksidecar0-dev,chardev=vsocksidecar0",
    ] {
        assert!(log.contains(part), "{part} is not in\n{log}");
    }
    let state: serde_json::Value = serde_json::from_str(&pod.admin("/state")).unwrap();
    assert!(state.to_string().contains("running"), "{state}");

    // A hook sidecar gets SIGTERM when `compute` does, and the guest is still shutting down. KubeVirt calls later.
    control.ok("hold last 5000");
    pod.terminate();
    until("the sidecar drains", || {
        pod.log().contains("draining").then_some(())
    });
    let _: InfoResult = launcher.call(&pod.hook(), INFO, Empty {}).unwrap();
    let _: Empty = launcher.call(&pod.hook(), SHUTDOWN, Empty {}).unwrap();
    pod.assert_running();
    control.ok("drop last");
    libvirt.stop();
    assert_eq!(pod.end().code(), Some(0), "{}", pod.log());
    assert!(pod.log().contains("drained in"), "{}", pod.log());
    drop(service);
}
