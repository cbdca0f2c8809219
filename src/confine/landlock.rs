//! A policy as a landlock ruleset. The calling thread has it from then on, and every thread that it starts.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, NetPort,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::policy::{Policy, Rights};

/// What is restricted if the kernel knows it; tests have seen it at work. Later versions add to connect to unix sockets (9) and
/// UDP (10), which need rules for what name services do.
const TESTED: ABI = ABI::V6;

/// What the kernel made of the policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// Restricted, by this version of landlock's ABI; and what this version cannot restrict.
    Restricted { abi: u32, lacks: Vec<&'static str> },
    /// Not restricted, and why.
    Unrestricted(&'static str),
}

/// Restricts the calling thread and its threads to come to what the policy names. There is no way back.
///
/// Sets no_new_privs. Paths that cannot be looked up are left out.
pub(super) fn restrict(policy: &Policy) -> Result<Outcome, RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(TESTED))?
        // Abstract unix sockets and signals of others.
        .scope(Scope::from_all(TESTED))?;
    if policy.ports.is_some() {
        ruleset = ruleset.handle_access(AccessNet::from_all(TESTED))?;
    }
    let mut ruleset = ruleset.create()?;
    for (path, rights) in &policy.paths {
        // Nothing to log to yet. What is needed and missing is named when it is used.
        if let Ok(fd) = PathFd::new(path) {
            ruleset = ruleset.add_rule(PathBeneath::new(fd, access(*rights)))?;
        }
    }
    if let Some(ports) = &policy.ports {
        for port in &ports.connect {
            ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
        }
        for port in &ports.bind {
            ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::BindTcp))?;
        }
    }
    let status = ruleset.restrict_self()?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Outcome::Unrestricted("the kernel has landlock and it is off: add it to the boot parameter lsm=")
        }
        (RulesetStatus::NotEnforced, _) => Outcome::Unrestricted(
            "the kernel or the container runtime has no landlock (Linux 5.13 with CONFIG_SECURITY_LANDLOCK)",
        ),
        (
            _,
            LandlockStatus::Available {
                effective_abi,
                kernel_abi,
            },
        ) => {
            let abi = kernel_abi.and_then(|abi| u32::try_from(abi).ok());
            Outcome::Restricted {
                abi: abi.unwrap_or(effective_abi as u32),
                lacks: lacks(effective_abi, policy.ports.is_some()),
            }
        }
        (_, _) => Outcome::Unrestricted("the kernel does not say which landlock it has"),
    })
}

/// What a kernel with `abi` leaves open of what was asked for.
fn lacks(abi: ABI, ports: bool) -> Vec<&'static str> {
    let known = [
        (ABI::V3, "truncating files (Linux 6.2)", true),
        (ABI::V4, "TCP ports (Linux 6.7)", ports),
        (ABI::V5, "device ioctls (Linux 6.10)", true),
        (ABI::V6, "abstract unix sockets and signals (Linux 6.12)", true),
    ];
    let lacks = known
        .into_iter()
        .filter(|(since, _, wanted)| abi < *since && *wanted);
    lacks.map(|(_, what, _)| what).collect()
}

fn access(rights: Rights) -> BitFlags<AccessFs> {
    let pairs = [
        (rights.read, AccessFs::ReadFile.into()),
        (rights.list, AccessFs::ReadDir.into()),
        (rights.sockets, AccessFs::MakeSock | AccessFs::RemoveFile),
        (rights.directories, AccessFs::MakeDir | AccessFs::RemoveDir),
    ];
    let granted = pairs.into_iter().filter(|(granted, _)| *granted);
    granted.fold(BitFlags::empty(), |sum, (_, rights)| sum | rights)
}
