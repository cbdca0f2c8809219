//! What a host or a node gets: the systemd unit and the seccomp profile, held against the program's own list of system calls.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

use crate::tools::{run, success, text};

/// The system calls of `src/confine/filter.rs`, without those it allows only to say that the kernel lacks them.
fn own_list() -> BTreeSet<String> {
    let source = text("src/confine/filter.rs");
    let code: String = source
        .lines()
        .map(|line| line.split("//").next().unwrap().to_owned() + "\n")
        .collect();
    let mut calls = BTreeSet::new();
    for list in ["const ALLOWED: &[Call]", "const LEGACY: &[Call]"] {
        let body = code.split(list).nth(1).unwrap().split("];").next().unwrap();
        calls.extend(
            body.split_whitespace()
                .filter_map(|word| word.strip_prefix("SYS_"))
                .map(str::to_owned),
        );
    }
    let conditional = code.split("fn by_argument").nth(1).unwrap();
    let conditional = conditional.split("\nfn ").next().unwrap();
    calls.extend(
        conditional
            .split("\"SYS_")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap().to_owned()),
    );
    assert!(calls.len() > 90, "{} system calls", calls.len());
    calls
}

fn profile() -> Vec<(BTreeSet<String>, Value)> {
    let profile: Value = serde_json::from_str(&text("deploy/seccomp/vsock-sidecar.json")).unwrap();
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
    // ENOSYS, at which libraries fall back to older calls.
    assert_eq!(profile["defaultErrnoRet"], 38);
    let groups = profile["syscalls"].as_array().unwrap().iter();
    groups
        .map(|group| {
            assert_eq!(group["action"], "SCMP_ACT_ALLOW");
            let names = group["names"].as_array().unwrap().iter();
            let names = names.map(|name| name.as_str().unwrap().to_owned()).collect();
            (names, group["args"].clone())
        })
        .collect()
}

#[test]
fn the_seccomp_profile_has_the_program_s_own_list() {
    let groups = profile();
    let mut own = own_list();
    assert!(own.remove("socket"), "which is by its family");
    assert_eq!(groups[0].0, own, "the first group is src/confine/filter.rs");

    let families: Vec<u64> = groups
        .iter()
        .filter(|(names, _)| names.contains("socket"))
        .map(|(_, arguments)| arguments[0]["value"].as_u64().unwrap())
        .collect();
    // AF_VSOCK is missing: a runtime's default profile has it not either, and a pod has no business with the node's vsock.
    assert_eq!(families, [1, 2, 10, 16]);
    let everything: BTreeSet<&String> = groups.iter().flat_map(|(names, _)| names).collect();
    for dangerous in [
        "ptrace",
        "mount",
        "bpf",
        "io_uring_setup",
        "unshare",
        "setns",
        "clone3",
        "keyctl",
        "kill",
    ] {
        assert!(!everything.contains(&dangerous.to_owned()), "{dangerous}");
    }
}

/// What systemd means by a set of system calls.
fn systemd_set(name: &str) -> BTreeSet<String> {
    let mut analyze = Command::new("systemd-analyze");
    let listing = success(run(
        analyze.args(["syscall-filter", name]),
        "apt-get install systemd",
    ));
    let mut calls = BTreeSet::new();
    for line in listing.lines().skip(1).map(str::trim) {
        match line.strip_prefix('@') {
            Some(_) => calls.extend(systemd_set(line)),
            None if line.starts_with('#') || line.is_empty() => {}
            None => {
                calls.insert(line.to_owned());
            }
        }
    }
    calls
}

#[test]
fn systemd_understands_the_unit_and_lets_the_program_make_its_system_calls() {
    let unit = text("deploy/systemd/vsock-sidecar.service");
    // The program is not installed where the tests run, so that another one stands for it.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vsock-sidecar.service");
    std::fs::write(&file, unit.replace("/usr/local/bin/vsock-sidecar", "/bin/true")).unwrap();
    let mut analyze = Command::new("systemd-analyze");
    let said = success(run(
        analyze.args(["verify", "--man=no"]).arg(&file),
        "apt-get install systemd",
    ));
    assert!(!said.contains("vsock-sidecar"), "{said}");

    // As systemd.exec(5) has it: the first line makes it a list of what is allowed, `~` takes away, each in its turn.
    let mut allowed = systemd_set("@default");
    for line in unit
        .lines()
        .filter_map(|line| line.strip_prefix("SystemCallFilter="))
    {
        let (names, takes_away) = line
            .strip_prefix('~')
            .map_or((line, false), |names| (names, true));
        for name in names.split_whitespace() {
            let calls = match name.starts_with('@') {
                true => systemd_set(name),
                false => BTreeSet::from([name.to_owned()]),
            };
            match takes_away {
                true => allowed.retain(|call| !calls.contains(call)),
                false => allowed.extend(calls),
            }
        }
    }
    let mut needed = own_list();
    needed.extend(
        [
            "landlock_create_ruleset",
            "landlock_add_rule",
            "landlock_restrict_self",
            "seccomp",
            "clone",
            "execve",
        ]
        .map(str::to_owned),
    );
    let missing: Vec<_> = needed.difference(&allowed).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
