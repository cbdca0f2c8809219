//! What a guest is booted from: a kernel, its modules and our init program, made from the source tree and kept in cargo's
//! target directory.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::VmError;
use super::cpio::Archive;
use super::wait::{self, GoOn};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Time to fetch kernels over a slow line, or to build the guest's program on a slow machine.
const PREPARE: Duration = Duration::from_secs(1800);

/// A kernel and the initramfs that goes with it.
#[derive(Clone, Debug)]
pub struct Assets {
    /// The kernel's release, as `uname -r` tells it.
    pub release: String,
    /// `vmlinux`, an ELF file.
    pub kernel: PathBuf,
    /// An uncompressed cpio archive: `/init` and `/modules`.
    pub initramfs: Vec<u8>,
    /// Where things that outlive a run are kept, [`Source::cache`].
    pub cache: PathBuf,
}

/// The source tree, from which a guest is made.
#[derive(Clone, Debug)]
pub struct Source {
    tree: PathBuf,
    cache: PathBuf,
    /// Whether the kernels' script may install programs that it lacks.
    install: bool,
}

impl Source {
    /// The tree that this program was built from, if it is still there. What is made goes to `vm` in `target`, or in
    /// cargo's own target directory: `CARGO_TARGET_DIR`, else `target` in the tree.
    pub fn find(target: Option<&Path>) -> Result<Source, VmError> {
        // Whoever builds an image says another place, so that the name of the real one makes no difference to the program's bytes.
        const TREE: &str = match option_env!("VSOCK_SIDECAR_SOURCE") {
            Some(said) => said,
            None => env!("CARGO_MANIFEST_DIR"),
        };
        Source::at(Path::new(TREE), target)
    }

    fn at(tree: &Path, target: Option<&Path>) -> Result<Source, VmError> {
        let source = Source {
            tree: tree.to_owned(),
            cache: match target {
                Some(target) => target.to_owned(),
                None => std::env::var_os("CARGO_TARGET_DIR")
                    .filter(|dir| !dir.is_empty())
                    .map_or_else(|| tree.join("target"), PathBuf::from),
            }
            .join("vm"),
            install: false,
        };
        for missing in [source.script(), source.guest()] {
            if !missing.is_file() {
                return Err(VmError::NoSource { missing });
            }
        }
        Ok(source)
    }

    /// Lets root's [`fetch_kernels`](Source::fetch_kernels) install programs that are missing, as a test machine wants it.
    /// Else they are named: a demo installs nothing.
    pub fn may_install(self) -> Source {
        Source {
            install: true,
            ..self
        }
    }

    /// Kernels, the guest program's own target directory, and how QEMU runs guests here.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Whether there is nothing to fetch for this kernel. The script decides that for itself; this is for telling people.
    pub fn has_kernel(&self, version: &str) -> bool {
        self.cache.join(version).join("release").is_file()
    }

    /// Fetches kernels, named by their version as in `6.12`; what is there is kept. Blocks.
    pub fn fetch_kernels(&self, versions: &[&str], go_on: GoOn<'_>) -> Result<(), VmError> {
        let sh = find_in_path("sh").ok_or(VmError::NoProgram {
            program: "sh",
            remedy: "put a POSIX shell there",
        })?;
        let mut command = Command::new(sh);
        command.arg(self.script()).arg(&self.cache).args(versions);
        if !self.install {
            command.env("FETCH_KERNELS_INSTALL", "no");
        }
        self.succeed("fetching the guest's kernel", &mut command, go_on)
    }

    /// Builds the guest's program and returns its path. Static, because the guest has no libraries; the target is named
    /// even where it is the host's own, because only then do flags for it stay away from build scripts and procedural
    /// macros. Blocks.
    pub fn build_init(&self, go_on: GoOn<'_>) -> Result<PathBuf, VmError> {
        let target_dir = self.cache.join("guest");
        let mut command = Command::new(cargo()?);
        command.args([
            "build",
            "--quiet",
            "--release",
            "--locked",
            "--target",
            TARGET,
            "--manifest-path",
        ]);
        command.arg(self.guest()).arg("--target-dir").arg(&target_dir);
        // What was set for this package (coverage, sanitizers, a linker) is not for the guest.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("CARGO_") && name != "CARGO_HOME" && !name.starts_with("CARGO_NET") {
                command.env_remove(name.as_ref());
            }
        }
        command
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTC_WORKSPACE_WRAPPER");
        command.env("RUSTFLAGS", "-C target-feature=+crt-static");
        self.succeed("building the guest's program", &mut command, go_on)?;
        Ok(target_dir.join(TARGET).join("release/vsock-test-guest"))
    }

    /// A kernel that was fetched, with the guest's program at `init`.
    pub fn assets(&self, version: &str, init: &Path) -> Result<Assets, VmError> {
        let dir = self.cache.join(version);
        let release = String::from_utf8_lossy(&read(&dir.join("release"))?)
            .trim()
            .to_owned();
        Ok(Assets {
            release,
            kernel: dir.join("vmlinux"),
            initramfs: initramfs(&read(init)?, &dir.join("modules"))?,
            cache: self.cache.clone(),
        })
    }

    fn script(&self) -> PathBuf {
        self.tree.join("tests/vm/fetch-kernels.sh")
    }

    fn guest(&self) -> PathBuf {
        self.tree.join("tests/guest/Cargo.toml")
    }

    /// Runs a command that may take minutes. It gets a process group of its own: Ctrl-C is for us, who then end it and
    /// everything that it started.
    fn succeed(&self, what: &'static str, command: &mut Command, go_on: GoOn<'_>) -> Result<(), VmError> {
        fs::create_dir_all(&self.cache).map_err(VmError::io(format!("make {}", self.cache.display())))?;
        /// Threads of one process may prepare at the same time.
        static RUN: AtomicU32 = AtomicU32::new(0);
        let run = RUN.fetch_add(1, Ordering::Relaxed);
        let log = Log(self
            .cache
            .join(format!("prepare-{}-{run}.log", std::process::id())));
        let output = File::create(&log.0).map_err(VmError::io(format!("create {}", log.0.display())))?;
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output);
        let child = command
            .spawn()
            .map_err(VmError::io(format!("run {}", command.get_program().display())))?;
        let mut group = Group(child);
        let status = match wait::end_of(&mut group.0, Instant::now() + PREPARE, go_on) {
            Ok(status) => status,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Err(VmError::Interrupted),
            Err(e) => return Err(VmError::io(format!("wait for the end of {what}"))(e)),
        };
        if status.success() {
            return Ok(());
        }
        let words = [command.get_program()].into_iter().chain(command.get_args());
        Err(VmError::Failed {
            what,
            command: words
                .collect::<Vec<&OsStr>>()
                .join(OsStr::new(" "))
                .display()
                .to_string(),
            status,
            output: String::from_utf8_lossy(&fs::read(&log.0).unwrap_or_default())
                .trim_end()
                .to_owned(),
        })
    }
}

/// A command with everything that it started, ended when dropped.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        // Once the child was waited for its number, and so the group's, may be another's.
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = kill_process_group(Pid::from_child(&self.0), Signal::TERM);
            let _ = self.0.wait();
        }
    }
}

/// A file that is removed when dropped.
struct Log(PathBuf);

impl Drop for Log {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The cargo that runs us, else the one in PATH.
fn cargo() -> Result<OsString, VmError> {
    std::env::var_os("CARGO")
        .or_else(|| find_in_path("cargo").map(PathBuf::into_os_string))
        .ok_or(VmError::NoProgram {
            program: "cargo",
            remedy: "install Rust from https://rustup.rs",
        })
}

/// The program of this name that a shell would run.
pub fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

fn initramfs(init: &[u8], modules: &Path) -> Result<Vec<u8>, VmError> {
    let mut archive = Archive::default();
    for name in ["dev", "proc", "sys", "modules"] {
        archive.directory(name);
    }
    archive.file("init", 0o755, init)?;
    let cannot_list = || format!("list {}", modules.display());
    for entry in fs::read_dir(modules).map_err(VmError::io(cannot_list()))? {
        let entry = entry.map_err(VmError::io(cannot_list()))?;
        let name = format!("modules/{}", entry.file_name().to_string_lossy());
        archive.file(&name, 0o644, &read(&entry.path())?)?;
    }
    Ok(archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>, VmError> {
    fs::read(path).map_err(VmError::io(format!("read {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> (tempfile::TempDir, Source) {
        let target = tempfile::tempdir().unwrap();
        let source = Source::find(Some(target.path())).unwrap();
        (target, source)
    }

    #[test]
    fn a_tree_that_is_gone_is_named() {
        let gone = Source::at(Path::new("/nonexistent/tree"), None)
            .unwrap_err()
            .to_string();
        assert!(gone.contains("builds its guest from the source tree"), "{gone}");
        assert!(
            gone.contains("/nonexistent/tree/tests/vm/fetch-kernels.sh"),
            "{gone}"
        );
    }

    #[test]
    fn a_command_that_fails_tells_what_it_said() {
        let (target, source) = source();
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such kernel >&2; exit 3"]);
        let failed = source.succeed("fetching", &mut command, &mut || true);
        let failed = failed.unwrap_err().to_string();
        assert!(failed.starts_with("fetching failed: sh -c echo"), "{failed}");
        assert!(failed.ends_with("exit status: 3\nno such kernel"), "{failed}");
        assert_eq!(target.path().join("vm").read_dir().unwrap().count(), 0);
    }

    #[test]
    fn an_interrupt_ends_a_command_and_what_it_started() {
        let (target, source) = source();
        let fifo = target.path().join("fifo");
        // The grandchild holds the fifo open for as long as it lives.
        let script = format!("mkfifo {0} && (exec sleep 1000 >{0}) & wait", fifo.display());
        let mut command = Command::new("sh");
        command.args(["-c", &script]);
        let mut held = None;
        let ended = source.succeed("sleeping", &mut command, &mut || {
            if held.is_none() && fifo.exists() {
                // Returns once the grandchild opens it too.
                held = Some(File::open(&fifo).unwrap());
            }
            held.is_none()
        });
        assert!(matches!(ended, Err(VmError::Interrupted)), "{ended:?}");
        let mut end = Vec::new();
        io::Read::read_to_end(&mut held.unwrap(), &mut end).unwrap();
        assert!(end.is_empty());
    }
}
