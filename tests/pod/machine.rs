//! The VMM's container: QEMU with the arguments of the pod's manifest and nothing else, and the line to the guest's program.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::container::outside;
use crate::tools::list;
use crate::vm::assets::assets;
use crate::vm::qemu::complaint;
use crate::volumes::Volumes;
use crate::{PATIENCE, wait_until};

/// Makes `guest`, with what the VMM's image has in `/guest`. May fetch it, so it is done before the pod's network is entered, from which nothing
/// can be reached.
pub fn prepare(guest: &Path) {
    let assets = assets("6.12");
    fs::create_dir(guest).unwrap();
    fs::copy(&assets.kernel, guest.join("vmlinux")).unwrap();
    fs::write(guest.join("initramfs"), &assets.initramfs).unwrap();
}

/// A running machine; dropping it kills QEMU.
pub struct Machine {
    child: Child,
    answers: BufReader<UnixStream>,
    guest: PathBuf,
}

impl Machine {
    /// Runs the VMM's container of a pod's manifest and waits until its guest has booted. `guest` is what [`prepare`] made.
    pub fn boot(pod: &Value, container: &Value, volumes: &Volumes, guest: &Path) -> Machine {
        let context = &pod["spec"]["securityContext"];
        let [user, group] =
            ["runAsUser", "runAsGroup"].map(|key| u32::try_from(context[key].as_u64().unwrap()).unwrap());
        let control = guest.join("control.sock");
        let listener = UnixListener::bind(&control).unwrap();
        fs::set_permissions(&control, fs::Permissions::from_mode(0o666)).unwrap();
        chown(guest, Some(user), Some(group)).unwrap();

        let words = list(&container["command"]).iter().chain(list(&container["args"]));
        let words = words.map(|word| outside(volumes, container, word.as_str().unwrap()));
        let words = words.map(|word| word.replace("/guest/", &format!("{}/", guest.display())));
        let log = fs::File::create(guest.join("qemu.log")).unwrap();
        // The pod's user; and killed with this thread, should nobody drop it.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--no-new-privs", "--clear-groups"])
            .arg(format!("--reuid={user}"))
            .arg(format!("--regid={group}"))
            .args(words)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("setpriv, which util-linux has");
        let mut machine = Machine {
            child,
            // Replaced at once; until then nothing is read of it.
            answers: BufReader::new(UnixStream::pair().unwrap().0),
            guest: guest.to_owned(),
        };
        listener.set_nonblocking(true).unwrap();
        wait_until("QEMU has started", || {
            assert!(machine.ended().is_none(), "QEMU has ended");
            match listener.accept() {
                Ok((line, _)) => {
                    line.set_nonblocking(false).unwrap();
                    line.set_read_timeout(Some(PATIENCE)).unwrap();
                    machine.answers = BufReader::new(line);
                    true
                }
                Err(_) => false,
            }
        });
        while !machine.line().starts_with("ready ") {}
        machine
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.answers
            .read_line(&mut line)
            .unwrap_or_else(|error| panic!("the guest says nothing: {error}"));
        assert!(line.ends_with('\n'), "QEMU has ended");
        line.trim_end().to_owned()
    }

    /// What the guest's program answers to a command (`tests/guest/src/command.rs`).
    pub fn answer(&mut self, command: &str) -> String {
        self.start(command);
        self.line()
    }

    /// The same for a command that has to succeed.
    #[track_caller]
    pub fn ok(&mut self, command: &str) -> String {
        let answer = self.answer(command);
        assert!(answer == "ok" || answer.starts_with("ok "), "{command}: {answer}");
        answer
    }

    /// Sends a command and waits for nothing.
    pub fn start(&mut self, command: &str) {
        writeln!(self.answers.get_mut(), "{command}").unwrap();
    }

    /// SIGTERM, at which QEMU ends.
    pub fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    /// How QEMU ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Nothing that its kernel wrote is a complaint.
    #[track_caller]
    pub fn is_well(&self) {
        let console = self.file("console.log");
        assert_eq!(complaint(&console), None, "{console}");
    }

    fn file(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.guest.join(name)).unwrap_or_default()).into_owned()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!(
                "--- QEMU said\n{}\n--- the guest's console\n{}",
                self.file("qemu.log"),
                self.file("console.log")
            );
        }
    }
}
