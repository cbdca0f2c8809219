//! Domains as KubeVirt makes them, before and after; and the command that makes the one of the other.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// `BEFORE.xml` and `BEFORE.after.xml` of `domains/`, and what the domain is about.
const DOMAINS: &[&str] = &[
    // Nothing but what every virtual machine has.
    "plain",
    // A configuration for Ignition, which comes by QEMU's arguments as well.
    "ignition",
    // Memory in huge pages, in two NUMA cells.
    "hugepages",
    // Memory that virtiofs has made shared.
    "shared",
    // Written by hand, and private wherever it can be.
    "private",
];

pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kubevirt/domains")
}

fn read(file: &str) -> String {
    fs::read_to_string(directory().join(file)).unwrap()
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"));
    command.args(arguments).stdin(Stdio::null()).env_clear();
    command
}

fn on_define_domain(arguments: &[&str]) -> Output {
    command(&[&["kubevirt", "on-define-domain"], arguments].concat())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// `VSOCK_TEST_BLESS=1` writes what comes out, to be read before it is committed.
#[test]
fn domains_come_out_as_they_should() {
    for name in DOMAINS {
        let before = read(&format!("{name}.xml"));
        let output = on_define_domain(&["--vmi", "{}", "--domain", &before]);
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
        assert_eq!(text(&output.stderr), "", "{name}");
        let after = text(&output.stdout);
        let file = directory().join(format!("{name}.after.xml"));
        if std::env::var_os("VSOCK_TEST_BLESS").is_some() {
            fs::write(&file, after).unwrap();
        }
        assert_eq!(after, fs::read_to_string(&file).unwrap(), "{name}");
        let again = on_define_domain(&["--domain", after]);
        assert_eq!(text(&again.stdout), after, "{name}: twice is more than once");
    }
}

#[test]
fn libvirts_schema_has_nothing_against_them() {
    if super::libvirt::is_left_out() {
        return;
    }
    for name in DOMAINS {
        for file in [format!("{name}.xml"), format!("{name}.after.xml")] {
            super::libvirt::validate(&directory().join(file));
        }
    }
}

#[test]
fn the_program_is_the_hook_of_the_sidecar_shim_by_its_name() {
    let before = read("ignition.xml");
    let vmi =
        r#"{"metadata":{"name":"coreos","namespace":"shop"},"spec":{"evictionStrategy":"LiveMigrate"}}"#;
    let output = command(&["--vmi", vmi, "--domain", &before])
        .arg0("/usr/bin/onDefineDomain")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout), read("ignition.after.xml"));
    let said = text(&output.stderr);
    assert!(
        said.contains("cannot be migrated") && said.lines().count() == 1,
        "{said}"
    );
}

#[test]
fn the_socket_is_an_option_or_the_environment() {
    let by_option = on_define_domain(&["--domain", "<domain/>", "--socket", "/run/a.sock"]);
    assert!(
        text(&by_option.stdout).contains(",path=/run/a.sock'"),
        "{by_option:?}"
    );
    let by_environment = command(&["kubevirt", "on-define-domain", "--domain", "<domain/>"])
        .env("VSOCK_SIDECAR_KUBEVIRT_SOCKET", "/run/b.sock")
        .output()
        .unwrap();
    assert!(
        text(&by_environment.stdout).contains(",path=/run/b.sock'"),
        "{by_environment:?}"
    );
}

/// One argument of a program may have 128 KiB on Linux (MAX_ARG_STRLEN); larger domains come by standard input.
#[test]
fn a_domain_comes_by_standard_input() {
    let before = read("plain.xml");
    let mut child = command(&["kubevirt", "on-define-domain", "--domain", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(before.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), read("plain.after.xml"));
}

#[test]
fn what_is_refused_is_one_line_and_exit_code_64() {
    let autoattach = r#"{"spec":{"domain":{"devices":{"autoattachVSOCK":true}}}}"#;
    let vsock = "<domain><devices><vsock model='virtio'/></devices></domain>";
    for (arguments, why) in [
        (vec!["--domain", "<domain>"], "no XML that can be read: line 1"),
        (
            vec!["--domain", "<network/>"],
            "this is no domain of QEMU: its element is <network>",
        ),
        (
            vec!["--domain", vsock],
            "remove autoattachVSOCK from the VirtualMachineInstance",
        ),
        (
            vec!["--domain", "<domain/>", "--vmi", autoattach],
            "remove spec.domain.devices.autoattachVSOCK",
        ),
        (
            vec!["--domain", "<domain/>", "--vmi", "{"],
            "the VirtualMachineInstance is no JSON",
        ),
        (
            vec!["--domain", "<domain/>", "--socket", "relative"],
            "is not absolute",
        ),
    ] {
        let output = on_define_domain(&arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{said}");
        assert_eq!(text(&output.stdout), "", "{said}");
        assert!(said.contains(why) && said.lines().count() == 1, "{said}");
    }
    assert_eq!(on_define_domain(&[]).status.code(), Some(64));
}
