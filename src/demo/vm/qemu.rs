//! One virtual machine.
//!
//! QEMU connects to sockets on which we already listen (control line, QMP), so that there is nothing to wait for but its
//! connection; only the vhost-user socket belongs to the sidecar. The guest's console goes to a file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::VmError;
use super::assets::{Assets, find_in_path};
use super::wait::{self, GoOn};

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// Time to the first command after a boot. Measured: 3 to 5 s on an idle machine without KVM.
const BOOT: Duration = Duration::from_secs(60);
/// Time for a command that says nothing else.
const COMMAND: Duration = Duration::from_secs(60);
/// Time for the kernel to come up under a KVM that works.
const PROBE: Duration = Duration::from_secs(10);

/// What a user of a machine may want different.
#[derive(Clone, Debug)]
pub struct Options {
    /// Guest memory in MiB, all of it shared with the back-end.
    pub memory_mib: u32,
    /// Appended to `-device vhost-user-vsock-pci,id=vsock0,chardev=vu`.
    pub device: String,
    /// Appended to the kernel's command line.
    pub kernel_line: String,
    /// Further arguments of QEMU. They come before the vsock device, which an IOMMU among them has to.
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

/// What QEMU runs a guest's instructions with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// Emulation: works everywhere, ten times slower and more.
    Tcg,
}

impl Accelerator {
    /// As `-accel` takes it.
    fn argument(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg,thread=multi",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
    }

    fn named(name: &str) -> Option<Accelerator> {
        [Accelerator::Kvm, Accelerator::Tcg]
            .into_iter()
            .find(|accelerator| accelerator.name() == name.trim())
    }
}

/// A running machine; dropping it kills QEMU.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    control: Lines,
    qmp: Lines,
    accelerator: Accelerator,
    /// When QEMU was started.
    started: Instant,
    boot_time: Duration,
    console: PathBuf,
    log: PathBuf,
}

impl Vm {
    /// Boots a guest whose vsock device is served at `socket` and waits for the control line. Files go to `dir`.
    pub fn boot(
        assets: &Assets,
        socket: &Path,
        dir: &Path,
        options: &Options,
        go_on: GoOn<'_>,
    ) -> Result<Vm, VmError> {
        let accelerator = accelerator(assets, dir, go_on)?;
        let mut vm = Vm::launch(assets, Some(socket), dir, options, accelerator, go_on)?;
        vm.wait_for_boot(go_on)?;
        vm.boot_time = vm.started.elapsed();
        Ok(vm)
    }

    /// The same for a machine without a vsock device.
    pub fn boot_without_device(
        assets: &Assets,
        dir: &Path,
        options: &Options,
        go_on: GoOn<'_>,
    ) -> Result<Vm, VmError> {
        let accelerator = accelerator(assets, dir, go_on)?;
        let mut vm = Vm::launch(assets, None, dir, options, accelerator, go_on)?;
        vm.wait_for_boot(go_on)?;
        vm.boot_time = vm.started.elapsed();
        Ok(vm)
    }

    /// Starts QEMU; without a vhost-user socket the machine has no vsock device.
    fn launch(
        assets: &Assets,
        socket: Option<&Path>,
        dir: &Path,
        options: &Options,
        accelerator: Accelerator,
        go_on: GoOn<'_>,
    ) -> Result<Vm, VmError> {
        let deadline = Instant::now() + BOOT;
        let path = |name: &str| dir.join(name);
        let [control, qmp] = ["control.sock", "qmp.sock"].map(|name| {
            let _ = fs::remove_file(path(name));
            UnixListener::bind(path(name)).map_err(VmError::io(format!("listen on {}", path(name).display())))
        });
        let (control, qmp) = (control?, qmp?);
        let initramfs = path("initramfs");
        fs::write(&initramfs, &assets.initramfs)
            .map_err(VmError::io(format!("write {}", initramfs.display())))?;
        let log = path("qemu.log");
        let open_log = || -> io::Result<(File, File)> {
            let file = OpenOptions::new().create(true).append(true).open(&log)?;
            Ok((file.try_clone()?, file))
        };
        let (stdout, stderr) = open_log().map_err(VmError::io(format!("open {}", log.display())))?;

        let mut command = die_with_us(PROGRAM);
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
            accelerator.argument(),
            "-m",
            &format!("{}M", options.memory_mib),
        ]);
        let memory = format!(
            "memory-backend-memfd,id=mem0,size={}M,share=on",
            options.memory_mib
        );
        command.args(["-object", &memory, "-kernel"]).arg(&assets.kernel);
        command.arg("-initrd").arg(&initramfs);
        let line = format!("console=ttyS0 quiet panic=0 nokaslr {}", options.kernel_line);
        command.args(["-append", line.trim_end()]);
        command.args([
            "-chardev",
            &format!("file,id=console,append=on,path={}", option(&path("console.log"))),
        ]);
        command.args([
            "-chardev",
            &format!("socket,id=control,path={}", option(&path("control.sock"))),
        ]);
        command.args([
            "-chardev",
            &format!("socket,id=qmp,path={}", option(&path("qmp.sock"))),
        ]);
        command.args([
            "-serial",
            "chardev:console",
            "-serial",
            "chardev:control",
            "-mon",
            "chardev=qmp,mode=control",
        ]);
        command.args(&options.arguments);
        if let Some(socket) = socket {
            command.args(["-chardev", &format!("socket,id=vu,path={}", option(socket))]);
            command.args([
                "-device",
                &format!("vhost-user-vsock-pci,id=vsock0,chardev=vu{}", options.device),
            ]);
        }
        // A process group of its own: Ctrl-C is for us, who then end the machine, rather than for both at once.
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr);
        let started = Instant::now();
        let child = command.spawn().map_err(VmError::io(format!(
            "run {PROGRAM} through setpriv, which util-linux has"
        )))?;

        // From here on the child ends with `guard`, whatever goes wrong.
        let mut guard = Guard(Some(child));
        let mut connections = || -> io::Result<(Lines, Lines)> {
            let control = Lines::accept(&control, deadline, go_on)?;
            let mut qmp = Lines::accept(&qmp, deadline, go_on)?;
            qmp.line(deadline, go_on)?;
            Ok((control, qmp))
        };
        let (control, qmp) = connections().map_err(|source| match source.kind() {
            io::ErrorKind::Interrupted => VmError::Interrupted,
            _ => VmError::NoStart {
                source,
                logs: wait::tail(&log, 20),
            },
        })?;
        let Some(child) = guard.0.take() else {
            unreachable!("it was put there above")
        };
        let mut vm = Vm {
            child,
            control,
            qmp,
            accelerator,
            started,
            boot_time: Duration::ZERO,
            console: path("console.log"),
            log,
        };
        vm.qmp("qmp_capabilities", json!({}))?;
        Ok(vm)
    }

    /// Waits until the guest has booted, the first time or again: for the line that its program writes then. Lines of
    /// before are skipped.
    pub fn wait_for_boot(&mut self, go_on: GoOn<'_>) -> Result<(), VmError> {
        self.wait_ready(BOOT, go_on)
            .map_err(|source| match source.kind() {
                io::ErrorKind::Interrupted => VmError::Interrupted,
                _ => VmError::NoBoot {
                    source,
                    logs: self.logs(),
                },
            })
    }

    fn wait_ready(&mut self, patience: Duration, go_on: GoOn<'_>) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        while !self.control.line(deadline, go_on)?.starts_with("ready ") {}
        Ok(())
    }

    /// Has the guest's program carry out a command (`tests/guest/src/command.rs`); the answer, whatever it is.
    pub fn answer(&mut self, command: &str, go_on: GoOn<'_>) -> Result<Answer, VmError> {
        self.start(command)?;
        match self.control.line(Instant::now() + COMMAND, go_on) {
            Ok(line) => Ok(Answer {
                command: command.to_owned(),
                line,
            }),
            Err(source) if source.kind() == io::ErrorKind::Interrupted => Err(VmError::Interrupted),
            Err(source) => Err(VmError::NoAnswer {
                command: command.to_owned(),
                source,
            }),
        }
    }

    /// Sends a command and waits for nothing.
    pub fn start(&mut self, command: &str) -> Result<(), VmError> {
        self.control.send(command).map_err(|source| VmError::NoAnswer {
            command: command.to_owned(),
            source,
        })
    }

    /// Carries out a QMP command; events that come meanwhile are skipped.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value, VmError> {
        let failed = |answer: String| VmError::Qmp {
            command: command.to_owned(),
            answer,
        };
        let request = json!({"execute": command, "arguments": arguments}).to_string();
        self.qmp.send(&request).map_err(|e| failed(e.to_string()))?;
        let deadline = Instant::now() + COMMAND;
        loop {
            let line = self.qmp.line(deadline, &mut || true);
            let line = line.map_err(|e| failed(e.to_string()))?;
            match serde_json::from_str::<Value>(&line) {
                Ok(reply) if reply.get("error").is_none() => {
                    if let Some(value) = reply.get("return") {
                        return Ok(value.clone());
                    }
                }
                _ => return Err(failed(line)),
            }
        }
    }

    /// SIGKILL, as an out-of-memory killer would.
    pub fn kill(self) {
        drop(self);
    }

    /// Console, QEMU's own output and, if the guest still answers, the kernel's log.
    pub fn logs(&mut self) -> String {
        // The machine may be dead or deaf: what it does not answer is not in the logs.
        if self.control.send("log").is_ok() {
            let deadline = Instant::now() + Duration::from_secs(3);
            let _ = self.control.line(deadline, &mut || true);
        }
        wait::tail(&self.console, 60) + &wait::tail(&self.log, 20)
    }

    /// The guest's console since the first boot in this directory.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// The file that [`console`](Vm::console) reads.
    pub fn console_log(&self) -> &Path {
        &self.console
    }

    /// Time from QEMU's start to the guest program's first word.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// What its instructions run on.
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A line of the guest's console in which its kernel complains.
pub fn complaint(console: &str) -> Option<&str> {
    console
        .lines()
        .find(|line| ["BUG:", "Oops", "panic"].iter().any(|word| line.contains(word)))
}

/// What the guest's program answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The command.
    pub command: String,
    /// The whole line.
    pub line: String,
}

impl Answer {
    /// Whether the command succeeded.
    pub fn is_ok(&self) -> bool {
        self.line == "ok" || self.line.starts_with("ok ")
    }

    /// Whether the command failed with the error of this name.
    pub fn is_err(&self, name: &str) -> bool {
        let mut words = self.line.split(' ');
        words.next() == Some("err") && words.next() == Some(name)
    }

    /// Itself, if the command succeeded.
    pub fn success(self) -> Result<Answer, VmError> {
        if self.is_ok() {
            Ok(self)
        } else {
            Err(self.other("a success"))
        }
    }

    /// The value of a field, `key=value`.
    pub fn text(&self, key: &str) -> Result<&str, VmError> {
        self.line
            .split(' ')
            .filter_map(|word| word.split_once('='))
            .find_map(|(name, value)| (name == key).then_some(value))
            .ok_or_else(|| self.other(&format!("an answer with {key}")))
    }

    /// The value of a decimal field.
    pub fn number(&self, key: &str) -> Result<u64, VmError> {
        let number = self.text(key)?.parse();
        number.map_err(|_| self.other(&format!("an answer with a number as {key}")))
    }

    /// The value of a field that holds a digest.
    pub fn digest(&self, key: &str) -> Result<u64, VmError> {
        let digest = u64::from_str_radix(self.text(key)?, 16);
        digest.map_err(|_| self.other(&format!("an answer with a digest as {key}")))
    }

    /// The value of a field that holds microseconds.
    pub fn time(&self, key: &str) -> Result<Duration, VmError> {
        Ok(Duration::from_micros(self.number(key)?))
    }

    /// For an answer that is not what was expected.
    pub fn other(&self, expected: &str) -> VmError {
        VmError::OtherAnswer {
            command: self.command.clone(),
            answer: self.line.clone(),
            expected: expected.to_owned(),
        }
    }
}

/// What QEMU runs guests with: KVM where a probe boot works. Stock kernels do not boot under every KVM that offers itself,
/// so the answer is found by trying, once, and remembered beside the kernels. `VSOCK_TEST_ACCELERATOR` decides otherwise.
fn accelerator(assets: &Assets, dir: &Path, go_on: GoOn<'_>) -> Result<Accelerator, VmError> {
    /// One probe at a time.
    static FOUND: Mutex<Option<Accelerator>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(accelerator) = *found {
        return Ok(accelerator);
    }
    let wish = std::env::var("VSOCK_TEST_ACCELERATOR").ok();
    let remembered = assets.cache.join("accelerator");
    let known = || Accelerator::named(&fs::read_to_string(&remembered).ok()?);
    let kvm = || OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let accelerator = if let Some(wished) = wish.and_then(|name| Accelerator::named(&name)) {
        wished
    } else if kvm().is_err() {
        Accelerator::Tcg
    } else if let Some(known) = known() {
        known
    } else {
        let accelerator = probe(assets, &dir.join("probe"), go_on)?;
        // Without it the next run probes again.
        let _ = fs::write(&remembered, format!("{}\n", accelerator.name()));
        accelerator
    };
    *found = Some(accelerator);
    Ok(accelerator)
}

/// Boots a machine without a device under KVM, in a directory that is made for it and removed.
fn probe(assets: &Assets, dir: &Path, go_on: GoOn<'_>) -> Result<Accelerator, VmError> {
    fs::create_dir_all(dir).map_err(VmError::io(format!("make {}", dir.display())))?;
    let vm = Vm::launch(assets, None, dir, &Options::default(), Accelerator::Kvm, go_on);
    let booted = match vm {
        Ok(mut vm) => vm.wait_ready(PROBE, go_on).map_err(|e| match e.kind() {
            io::ErrorKind::Interrupted => VmError::Interrupted,
            _ => VmError::io("boot under KVM")(e),
        }),
        Err(error) => Err(error),
    };
    let _ = fs::remove_dir_all(dir);
    match booted {
        Ok(()) => Ok(Accelerator::Kvm),
        Err(VmError::Interrupted) => Err(VmError::Interrupted),
        Err(_) => Ok(Accelerator::Tcg),
    }
}

/// The words of `qemu-system-x86_64 --version` that name its version, if there is one.
pub fn version() -> Option<String> {
    let output = Command::new(find_in_path(PROGRAM)?)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = text.split_once("version ")?.1.split([' ', '\n']).next()?;
    Some(number.to_owned())
}

/// A command whose process is killed when the thread that starts it ends, so that a run that is killed itself leaves no
/// machine running. Dropping the handle stays the ordinary way.
pub fn die_with_us(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

/// A path in a QEMU option, where a comma would end it and is doubled instead.
fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
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
#[derive(Debug)]
struct Lines {
    stream: UnixStream,
    /// What was read behind the last line.
    rest: Vec<u8>,
}

impl Lines {
    fn accept(listener: &UnixListener, deadline: Instant, go_on: GoOn<'_>) -> io::Result<Lines> {
        wait::readable(listener, deadline, go_on)?;
        let (stream, _) = listener.accept()?;
        Ok(Lines {
            stream,
            rest: Vec::new(),
        })
    }

    fn send(&mut self, line: &str) -> io::Result<()> {
        self.stream.write_all(format!("{line}\n").as_bytes())
    }

    fn line(&mut self, deadline: Instant, go_on: GoOn<'_>) -> io::Result<String> {
        loop {
            if let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            wait::readable(&self.stream, deadline, go_on)?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.rest.extend(buffer.iter().take(n)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_by_key() {
        let answer = |line: &str| Answer {
            command: "client 1".into(),
            line: line.into(),
        };
        let good = answer("ok us=1500 sent_digest=00ff text=a%20b");
        assert_eq!(good.time("us").unwrap(), Duration::from_micros(1500));
        assert_eq!(good.digest("sent_digest").unwrap(), 255);
        assert_eq!(
            good.number("none").unwrap_err().to_string(),
            "the guest answered \"client 1\" with \"ok us=1500 sent_digest=00ff text=a%20b\", which is not an answer \
             with none"
        );
        let bad = answer("err ECONNRESET step=connect us=3");
        assert!(bad.is_err("ECONNRESET") && !bad.is_err("ECONN") && !bad.is_ok());
        assert!(bad.success().is_err());
    }

    #[test]
    fn paths_keep_their_commas() {
        assert_eq!(option(Path::new("/tmp/a,b")), "/tmp/a,,b");
    }

    #[test]
    fn a_complaint_of_the_kernel_is_found() {
        assert_eq!(
            complaint("fine\n[1.0] BUG: soft lockup\n"),
            Some("[1.0] BUG: soft lockup")
        );
        assert_eq!(complaint("fine\n"), None);
    }
}
