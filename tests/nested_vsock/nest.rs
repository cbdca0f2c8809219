//! The machine: Debian's kernel, this test program and the binary, with the libraries that they are linked to.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use vsock_sidecar::demo::vm::cpio::Archive;
use vsock_sidecar::demo::vm::text;

use super::vm::assets::{Assets, assets};
use super::vm::extra::add;
use super::vm::lab::tell;
use super::vm::qemu::{Options, Vm};
use super::vm::wait_until;

/// Where this program is in the machine.
const PROGRAM: &str = "/bin/nested";
/// Programs and their copies while the initramfs is unpacked.
const MEMORY_MIB: u32 = 1024;
/// For one scenario, emulated, with a program that is not optimized.
const PATIENCE: Duration = Duration::from_secs(180);

/// A running machine.
pub struct Nest {
    vm: Vm,
    kernel: String,
    runs: u32,
    _dir: tempfile::TempDir,
}

impl Nest {
    /// Boots one.
    pub fn boot(kernel: &str) -> Nest {
        let dir = tempfile::tempdir().unwrap();
        let mut assets = assets(kernel);
        add(&mut assets, |module| module == "vsock_loopback", &[]);
        add_programs(&mut assets, dir.path());
        let options = Options {
            memory_mib: MEMORY_MIB,
            ..Options::default()
        };
        Nest {
            vm: Vm::boot_without_device(&assets, dir.path(), &options),
            kernel: assets.release.clone(),
            runs: 0,
            _dir: dir,
        }
    }

    /// Runs one of this program's ignored tests in the machine; fails with what it said.
    pub fn run(&mut self, scenario: &str) {
        self.runs += 1;
        let name = format!("run{}", self.runs);
        let begin = Instant::now();
        self.vm.ok(&format!(
            "spawn {name} {PROGRAM} --exact inside::{scenario} --ignored --nocapture"
        ));
        let (mut said, mut state) = (String::new(), String::new());
        wait_until(scenario, PATIENCE, || {
            let answer = self.vm.ok(&format!("output {name} {}", said.len()));
            let piece = text::decode(answer.text("text")).expect("encoded by the guest's program");
            said += std::str::from_utf8(&piece).expect("the scenarios speak ASCII");
            state = answer.text("state").to_owned();
            // Asked too often, it has no time for anything else: a letter is an interrupt.
            if piece.is_empty() {
                std::thread::sleep(Duration::from_millis(200));
            }
            state != "running" && piece.is_empty()
        });
        let time = begin.elapsed().as_secs_f64();
        // A scenario that is not found is none that failed.
        let passed = state == "exited-0" && said.contains("test result: ok. 1 passed");
        if !passed {
            let logs = self.vm.logs();
            panic!(
                "{scenario} on Linux {}: {state}\n{said}\n--- machine\n{logs}",
                self.kernel
            );
        }
        tell(&format!(
            "nested sidecar on Linux {}: {scenario}: ok, {time:.1} s",
            self.kernel
        ));
    }
}

/// Adds the binary, at the path where the scenarios expect it (that of this machine), this program, and their libraries.
fn add_programs(assets: &mut Assets, dir: &Path) {
    let sidecar = PathBuf::from(env!("CARGO_BIN_EXE_vsock-sidecar"));
    let ourselves = std::env::current_exe().unwrap();
    let mut archive = Archive::default();
    let mut made = BTreeSet::new();
    let mut add = |from: &Path, to: &Path| {
        for parent in to.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
            let parent = parent.strip_prefix("/").unwrap_or(parent);
            if parent != Path::new("") && made.insert(parent.to_owned()) {
                archive.directory(&parent.display().to_string());
            }
        }
        let to = to.strip_prefix("/").expect("absolute");
        let content = fs::read(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
        archive.file(&to.display().to_string(), 0o755, &content).unwrap();
    };
    let mut libraries = BTreeSet::new();
    for (program, to) in [(&sidecar, sidecar.as_path()), (&ourselves, Path::new(PROGRAM))] {
        libraries.extend(libraries_of(program));
        add(&stripped(program, dir), to);
    }
    for library in &libraries {
        add(library, library);
    }
    // The mark by which the scenarios know where they are, and a place for their files.
    add(Path::new("/dev/null"), Path::new(super::inside::MARK));
    archive.directory("tmp");
    assets.initramfs.extend(archive.finish());
}

/// A copy without debug information, which is four fifths of the file, if the system has `strip`.
fn stripped(program: &Path, dir: &Path) -> PathBuf {
    let to = dir.join(program.file_name().expect("a file"));
    let done = Command::new("strip").arg("-o").arg(&to).arg(program).status();
    match done {
        Ok(status) if status.success() => to,
        _ => program.to_owned(),
    }
}

/// The files that the dynamic linker would load for a program, itself included.
fn libraries_of(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .expect("ldd, which comes with the C library");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // "name => /path (address)", or "/path (address)"
    let paths: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect();
    assert!(!paths.is_empty(), "ldd {}: {text}", program.display());
    paths
}
