//! One virtual machine.
//!
//! QEMU connects to sockets on which the harness already listens (control line, QMP), so that there is nothing to wait for
//! but its connection; only the vhost-user socket belongs to the sidecar. The guest's console goes to a file.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::assets::{self, Assets};

/// Time to the first command after a boot. Measured: 3 to 5 s on an idle machine without KVM.
const BOOT: Duration = Duration::from_secs(60);
/// Time for a command that says nothing else.
const COMMAND: Duration = Duration::from_secs(60);

/// What a test may want different.
#[derive(Clone, Debug)]
pub struct Options {
    /// Guest memory in MiB, all of it shared with the back-end.
    pub memory_mib: u32,
    /// Appended to `-device vhost-user-vsock-pci,id=vsock0,chardev=vu`.
    pub device: String,
    /// Appended to the kernel's command line.
    pub kernel_line: String,
    /// Further arguments of QEMU.
    pub arguments: Vec<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            memory_mib: 256,
            device: String::new(),
            kernel_line: String::new(),
            arguments: Vec::new(),
        }
    }
}

/// A running machine; dropping it kills QEMU.
pub struct Vm {
    child: Child,
    control: Lines,
    qmp: Lines,
    console: PathBuf,
    log: PathBuf,
}

impl Vm {
    /// Boots a guest whose vsock device is served at `socket` and waits for the control line. Files go to `dir`.
    pub fn boot(assets: &Assets, socket: &Path, dir: &Path, options: &Options) -> Vm {
        let vm = Vm::launch(assets, Some(socket), dir, options, accelerator(assets));
        let mut vm = vm.unwrap_or_else(|e| panic!("QEMU did not start: {e}"));
        if let Err(e) = vm.wait_ready(BOOT) {
            panic!("the guest did not come up: {e}\n{}", vm.logs());
        }
        vm
    }

    /// Starts QEMU; without a vhost-user socket the machine has no vsock device.
    fn launch(
        assets: &Assets,
        socket: Option<&Path>,
        dir: &Path,
        options: &Options,
        accelerator: &str,
    ) -> Result<Vm, String> {
        let deadline = Instant::now() + BOOT;
        let path = |name: &str| dir.join(name);
        let text = |path: PathBuf| {
            path.to_str()
                .expect("temporary directories have plain names")
                .to_owned()
        };
        for name in ["control.sock", "qmp.sock"] {
            let _ = fs::remove_file(path(name));
        }
        let control = UnixListener::bind(path("control.sock")).map_err(|e| e.to_string())?;
        let qmp = UnixListener::bind(path("qmp.sock")).map_err(|e| e.to_string())?;
        fs::write(path("initramfs"), &assets.initramfs).map_err(|e| e.to_string())?;
        let log = path("qemu.log");
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(|e| e.to_string())?;

        let mut command = die_with_us("qemu-system-x86_64");
        command.args([
            "-machine",
            "q35,memory-backend=mem0",
            "-cpu",
            "max",
            "-nodefaults",
            "-no-user-config",
        ]);
        command.args([
            "-display",
            "none",
            "-accel",
            accelerator,
            "-m",
            &format!("{}M", options.memory_mib),
        ]);
        let memory = format!(
            "memory-backend-memfd,id=mem0,size={}M,share=on",
            options.memory_mib
        );
        command.args(["-object", &memory, "-kernel"]).arg(&assets.kernel);
        command.args(["-initrd", &text(path("initramfs"))]);
        let line = format!("console=ttyS0 quiet panic=0 nokaslr {}", options.kernel_line);
        command.args(["-append", line.trim_end()]);
        command.args([
            "-chardev",
            &format!("file,id=console,append=on,path={}", text(path("console.log"))),
        ]);
        command.args([
            "-chardev",
            &format!("socket,id=control,path={}", text(path("control.sock"))),
        ]);
        command.args([
            "-chardev",
            &format!("socket,id=qmp,path={}", text(path("qmp.sock"))),
        ]);
        command.args([
            "-serial",
            "chardev:console",
            "-serial",
            "chardev:control",
            "-mon",
            "chardev=qmp,mode=control",
        ]);
        if let Some(socket) = socket {
            command.args([
                "-chardev",
                &format!("socket,id=vu,path={}", text(socket.to_owned())),
            ]);
            command.args([
                "-device",
                &format!("vhost-user-vsock-pci,id=vsock0,chardev=vu{}", options.device),
            ]);
        }
        command.args(&options.arguments);
        command.stdin(Stdio::null()).stdout(clone(&output)).stderr(output);
        let child = command
            .spawn()
            .map_err(|e| format!("cannot run qemu-system-x86_64: {e}"))?;

        // From here on the child ends with `guard`, whatever goes wrong.
        let mut guard = Guard(Some(child));
        let accept = |listener: UnixListener| Lines::accept(&listener, deadline);
        let refused = |e: io::Error| format!("{e}\n{}", super::tail(&log, 20));
        let control = accept(control).map_err(refused)?;
        let mut qmp = accept(qmp).map_err(refused)?;
        qmp.line(deadline).map_err(refused)?;
        let child = guard.0.take().expect("it was put there above");
        let mut vm = Vm {
            child,
            control,
            qmp,
            console: path("console.log"),
            log: log.clone(),
        };
        vm.qmp("qmp_capabilities", json!({}));
        Ok(vm)
    }

    /// Waits for the line that the guest's program writes after a boot; lines of before are skipped.
    fn wait_ready(&mut self, patience: Duration) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        while !self.control.line(deadline)?.starts_with("ready ") {}
        Ok(())
    }

    /// Has the guest's program carry out a command (`tests/guest/src/command.rs`) that must succeed.
    pub fn ok(&mut self, command: &str) -> Answer {
        let answer = self.answer(command);
        assert!(answer.is_ok(), "{command}: {}", answer.line);
        answer
    }

    /// Has the guest's program carry out a command that must fail with the error of this name.
    pub fn err(&mut self, command: &str, name: &str) -> Answer {
        let answer = self.answer(command);
        assert!(
            answer.line.starts_with(&format!("err {name}")),
            "{command}: {}, not {name}",
            answer.line
        );
        answer
    }

    /// The answer to a command, whatever it is.
    pub fn answer(&mut self, command: &str) -> Answer {
        self.start(command);
        match self.control.line(Instant::now() + COMMAND) {
            Ok(line) => Answer { line },
            Err(e) => panic!("the guest did not answer {command:?}: {e}"),
        }
    }

    /// Sends a command and waits for nothing.
    pub fn start(&mut self, command: &str) {
        self.control
            .stream
            .write_all(format!("{command}\n").as_bytes())
            .unwrap();
    }

    /// Presses the reset button and waits for nothing; [`Vm::wait_for_boot`] does.
    pub fn press_reset(&mut self) {
        self.qmp("system_reset", json!({}));
    }

    /// Waits until the guest has booted again.
    pub fn wait_for_boot(&mut self) {
        self.wait_ready(BOOT)
            .unwrap_or_else(|e| panic!("the guest did not come up after the reset: {e}"));
    }

    /// Carries out a QMP command; events that come meanwhile are skipped.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        self.qmp
            .stream
            .write_all(format!("{request}\n").as_bytes())
            .unwrap();
        let deadline = Instant::now() + COMMAND;
        loop {
            let line = self
                .qmp
                .line(deadline)
                .unwrap_or_else(|e| panic!("QMP {command}: {e}"));
            let reply: Value = serde_json::from_str(&line).unwrap();
            assert!(reply.get("error").is_none(), "QMP {command}: {line}");
            if let Some(value) = reply.get("return") {
                return value.clone();
            }
        }
    }

    /// SIGKILL, as an out-of-memory killer would.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Console, QEMU's own output and, if the guest still answers, the kernel's log.
    pub fn logs(&mut self) -> String {
        // The machine may be dead or deaf: what it does not answer is not in the logs.
        if self.control.stream.write_all(b"log\n").is_ok() {
            let _ = self.control.line(Instant::now() + Duration::from_secs(3));
        }
        super::tail(&self.console, 60) + &super::tail(&self.log, 20)
    }

    /// The guest's console since the first boot in this directory.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the guest's program answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The whole line.
    pub line: String,
}

impl Answer {
    /// Whether the command succeeded.
    pub fn is_ok(&self) -> bool {
        self.line == "ok" || self.line.starts_with("ok ")
    }

    /// The value of a field, `key=value`.
    pub fn text(&self, key: &str) -> &str {
        let fields: HashMap<&str, &str> = self
            .line
            .split(' ')
            .filter_map(|word| word.split_once('='))
            .collect();
        fields
            .get(key)
            .copied()
            .unwrap_or_else(|| panic!("no {key} in: {}", self.line))
    }

    /// The value of a decimal field.
    pub fn number(&self, key: &str) -> u64 {
        self.text(key)
            .parse()
            .unwrap_or_else(|_| panic!("{key} is no number in: {}", self.line))
    }

    /// The value of a field that holds a digest.
    pub fn digest(&self, key: &str) -> u64 {
        u64::from_str_radix(self.text(key), 16)
            .unwrap_or_else(|_| panic!("{key} is no digest in: {}", self.line))
    }
}

/// What QEMU runs guests with: `kvm` where a probe boot works, else `tcg`. Stock kernels do not boot under every KVM that
/// offers itself, so the answer is found by trying, once, and remembered beside the kernels.
fn accelerator(assets: &Assets) -> &'static str {
    const TCG: &str = "tcg,thread=multi";
    static ACCELERATOR: OnceLock<&'static str> = OnceLock::new();
    ACCELERATOR.get_or_init(|| {
        match std::env::var("VSOCK_TEST_ACCELERATOR").as_deref() {
            Ok("kvm") => return "kvm",
            Ok("tcg") => return TCG,
            _ => {}
        }
        if OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_err()
        {
            return TCG;
        }
        let remembered = assets::directory().join("accelerator");
        match fs::read_to_string(&remembered).as_deref().map(str::trim) {
            Ok("kvm") => return "kvm",
            Ok("tcg") => return TCG,
            _ => {}
        }
        let dir = tempfile::tempdir().unwrap();
        let probe = Vm::launch(assets, None, dir.path(), &Options::default(), "kvm");
        let works = probe.is_ok_and(|mut vm| vm.wait_ready(Duration::from_secs(10)).is_ok());
        let _ = fs::write(&remembered, if works { "kvm\n" } else { "tcg\n" });
        if works { "kvm" } else { TCG }
    })
}

/// A command whose process is killed when the thread that starts it ends, so that a test run that is killed itself leaves
/// no machine running. Dropping the handle stays the ordinary way.
pub fn die_with_us(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

fn clone(file: &File) -> File {
    file.try_clone().expect("a descriptor can be duplicated")
}

/// Kills a child that nobody took over.
struct Guard(Option<Child>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A connection that speaks in lines.
struct Lines {
    stream: UnixStream,
    /// What was read behind the last line.
    rest: Vec<u8>,
}

impl Lines {
    fn accept(listener: &UnixListener, deadline: Instant) -> io::Result<Lines> {
        super::wait_readable(listener, deadline)?;
        let (stream, _) = listener.accept()?;
        Ok(Lines {
            stream,
            rest: Vec::new(),
        })
    }

    fn line(&mut self, deadline: Instant) -> io::Result<String> {
        loop {
            if let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            super::wait_readable(&self.stream, deadline)?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.rest.extend_from_slice(&buffer[..n]),
            }
        }
    }
}
