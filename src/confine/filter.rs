//! The system calls that the program has a use for, and the seccomp filter made of them.
//!
//! The list holds for glibc and musl and for both architectures: it names what either library makes of the same function. It was
//! held against what `strace` saw of the end-to-end tests, which also fail when a call is refused. What they do not reach is for
//! the resolver and its modules, for watching the configuration, and for a last breath (abort(3)).

use std::collections::BTreeMap;

use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilterError {
    /// The list of system calls is for other architectures.
    #[error("there is no list of system calls for {0}")]
    Architecture(&'static str),
    /// The rules make no program; a test would have said so.
    #[error("the rules make no program: {0}")]
    Rules(#[from] BackendError),
    /// The kernel does not take the filter.
    #[error("the kernel does not take the filter: {0}")]
    Kernel(#[from] seccompiler::Error),
}

/// What becomes of a call that is not on the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unlisted {
    /// SIGSYS, which [`crate::sys::sigsys`] makes an error of.
    Trapped,
    /// Carried out, and written to the kernel's log.
    Logged,
}

/// Filters the calls of every thread of the process, those to come included. There is no way back.
///
/// A call in the manner of another architecture (32-bit code) kills the process: numbers mean something else there.
pub(super) fn apply(unlisted: Unlisted) -> Result<(), FilterError> {
    if unlisted == Unlisted::Trapped {
        seccompiler::apply_filter_all_threads(&unavailable()?)?;
    }
    Ok(seccompiler::apply_filter_all_threads(&listed(unlisted)?)?)
}

/// Numbers of the calls that are allowed with some arguments only.
pub(super) fn partly_allowed() -> impl Iterator<Item = i64> {
    by_argument().into_iter().flatten().map(|((number, _), _)| number)
}

/// What a number is called; `None` for calls that nobody in this process should have heard of.
pub(super) fn name(number: i64) -> Option<&'static str> {
    let calls = ALLOWED.iter().chain(LEGACY).chain(UNTRAPPED).chain(REFUSED);
    calls
        .copied()
        .chain(by_argument().into_iter().flatten().map(|(call, _)| call))
        .find(|(known, _)| *known == number)
        .map(|(_, name)| name.trim_start_matches("SYS_"))
}

/// Number, and name with the prefix that libc gives it.
type Call = (i64, &'static str);

macro_rules! calls {
    ($($name:ident)*) => { &[$((libc::$name, stringify!($name))),*] };
}

/// Allowed whatever their arguments are.
///
/// The calls of the data path are among these and not in [`by_argument`] for the sake of speed too: for a number that is always
/// allowed the kernel looks into a bitmap and runs no filter (seccomp_cache_check_allow, Linux 5.11).
#[rustfmt::skip]
const ALLOWED: &[Call] = calls![
    // Bytes.
    SYS_read SYS_readv SYS_pread64 SYS_write SYS_writev SYS_lseek
    SYS_sendto SYS_sendmsg SYS_sendmmsg SYS_recvfrom SYS_recvmsg
    // Descriptors.
    SYS_close SYS_dup SYS_fcntl SYS_flock SYS_pipe2 SYS_eventfd2
    SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_ppoll
    // Sockets, but for their making.
    SYS_bind SYS_listen SYS_accept SYS_accept4 SYS_connect SYS_shutdown
    SYS_getsockname SYS_getpeername SYS_getsockopt SYS_setsockopt
    // Files: which ones is landlock's to say.
    SYS_openat SYS_newfstatat SYS_fstat SYS_statx SYS_readlinkat SYS_getdents64 SYS_getcwd
    SYS_faccessat SYS_faccessat2 SYS_unlinkat SYS_mkdirat SYS_fchmod SYS_fchmodat
    // A configuration that is watched for changes.
    SYS_inotify_init1 SYS_inotify_add_watch SYS_inotify_rm_watch
    // Memory. Guests' memory is mapped with mmap, see `by_argument`.
    SYS_munmap SYS_mremap SYS_madvise SYS_brk
    // Threads. What glibc and musl call while signals are blocked must be here or in UNTRAPPED, see `sys::sigsys`.
    SYS_futex SYS_set_robust_list SYS_rseq SYS_set_tid_address SYS_exit SYS_exit_group SYS_gettid SYS_getpid
    SYS_sched_yield SYS_sched_getaffinity SYS_membarrier SYS_restart_syscall
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sigaltstack
    // Time and chance.
    SYS_clock_gettime SYS_clock_getres SYS_clock_nanosleep SYS_nanosleep SYS_gettimeofday SYS_getrandom
    // Who and where we are: the resolver asks for the host's name, allocators and sorting for the memory.
    SYS_uname SYS_sysinfo SYS_getuid SYS_geteuid SYS_getgid SYS_getegid
];

/// What libraries on x86-64 still use and other architectures never had.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const LEGACY: &[Call] = calls![
    SYS_poll SYS_epoll_wait SYS_open SYS_stat SYS_lstat SYS_access SYS_readlink SYS_unlink SYS_mkdir SYS_rmdir SYS_chmod
    SYS_pipe
];
#[cfg(not(target_arch = "x86_64"))]
const LEGACY: &[Call] = &[];

/// What C libraries may call while all signals are blocked, when a trap would kill the process: they are told that the kernel
/// does not have it. So is fork(2), which is clone without CLONE_THREAD; a thread is made by the same call with it. clone3
/// takes its flags in memory, where no filter sees them, and libraries do without it.
#[rustfmt::skip]
const UNTRAPPED: &[Call] = calls![ SYS_clone3 SYS_futex_waitv SYS_mseal ];
#[cfg(target_arch = "x86_64")]
const UNTRAPPED_LEGACY: &[Call] = calls![SYS_fork SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const UNTRAPPED_LEGACY: &[Call] = &[];

/// What has a name in the log when it is refused: what an intruder would reach for, and what a library might.
#[rustfmt::skip]
const REFUSED: &[Call] = calls![
    SYS_execve SYS_execveat SYS_ptrace SYS_process_vm_readv SYS_process_vm_writev SYS_kill SYS_tkill
    SYS_pidfd_open SYS_pidfd_getfd SYS_pidfd_send_signal SYS_wait4 SYS_waitid
    SYS_mount SYS_umount2 SYS_pivot_root SYS_chroot SYS_move_mount SYS_open_tree SYS_fsopen SYS_unshare SYS_setns
    SYS_setuid SYS_setgid SYS_setresuid SYS_setresgid SYS_setgroups SYS_capset SYS_personality SYS_seccomp
    SYS_bpf SYS_perf_event_open SYS_io_uring_setup SYS_io_uring_enter SYS_io_uring_register SYS_userfaultfd
    SYS_keyctl SYS_add_key SYS_request_key SYS_init_module SYS_finit_module SYS_kexec_load SYS_reboot SYS_syslog
    SYS_memfd_create SYS_memfd_secret SYS_pkey_mprotect SYS_remap_file_pages SYS_mlock SYS_msync SYS_mincore
    SYS_renameat SYS_renameat2 SYS_linkat SYS_symlinkat SYS_mknodat SYS_fchown SYS_fchownat SYS_openat2
    SYS_open_by_handle_at SYS_truncate SYS_ftruncate SYS_fallocate SYS_fsync SYS_splice SYS_tee SYS_vmsplice
    SYS_sendfile SYS_copy_file_range SYS_umask SYS_chdir SYS_setrlimit SYS_getrlimit SYS_sched_setaffinity
    SYS_sched_setscheduler SYS_setpriority SYS_shmget SYS_shmat SYS_msgget SYS_semget SYS_adjtimex SYS_clock_settime
    SYS_sethostname SYS_swapon SYS_quotactl SYS_nfsservctl SYS_fanotify_init SYS_kcmp SYS_getppid SYS_capget
    SYS_landlock_create_ruleset SYS_landlock_add_rule SYS_landlock_restrict_self
];

/// Allowed if one of the rules of the call holds.
fn by_argument() -> Result<Vec<(Call, Vec<SeccompRule>)>, BackendError> {
    let is = |index, value: i64| SeccompCondition::new(index, Dword, Eq, value as u64);
    let has = |index, mask: i64, value: i64| compare(index, Dword, MaskedEq(mask as u64), value as u64);
    let one_of = |index, values: &[i64]| {
        values
            .iter()
            .map(|value| SeccompRule::new(vec![is(index, *value)?]))
            .collect::<Result<Vec<_>, _>>()
    };
    let rule = |conditions: Vec<SeccompCondition>| SeccompRule::new(conditions);
    let [exec, write, anonymous] = [libc::PROT_EXEC, libc::PROT_WRITE, libc::MAP_ANONYMOUS].map(i64::from);

    let mut mmap = vec![rule(vec![has(2, exec, 0)?])?];
    // glibc loads a module of nsswitch.conf when a name is first looked up. A static program loads nothing.
    if !cfg!(target_feature = "crt-static") {
        mmap.push(rule(vec![has(2, exec | write, exec)?, has(3, anonymous, 0)?])?);
    }

    let mut socket = Vec::new();
    for (family, kind, protocols) in SOCKETS {
        for protocol in *protocols {
            // The other bits of the type are SOCK_CLOEXEC and SOCK_NONBLOCK (SOCK_TYPE_MASK, include/linux/net.h).
            let conditions = vec![
                is(0, (*family).into())?,
                has(1, 0xf, (*kind).into())?,
                is(2, (*protocol).into())?,
            ];
            socket.push(rule(conditions)?);
        }
    }

    // getrlimit(2) is this call in either library. The limit of descriptors is raised at start.
    let nofile = i64::from(libc::RLIMIT_NOFILE);
    let prlimit = vec![
        rule(vec![is(0, 0)?, is(1, nofile)?])?,
        rule(vec![is(0, 0)?, compare(2, Qword, Eq, 0)?])?,
    ];
    let own_pid = i64::from(std::process::id());
    Ok(vec![
        ((libc::SYS_mmap, "SYS_mmap"), mmap),
        (
            (libc::SYS_mprotect, "SYS_mprotect"),
            vec![rule(vec![has(2, exec, 0)?])?],
        ),
        ((libc::SYS_socket, "SYS_socket"), socket),
        (
            (libc::SYS_socketpair, "SYS_socketpair"),
            one_of(0, &[libc::AF_UNIX.into()])?,
        ),
        // abort(3), after a panic while another is under way.
        ((libc::SYS_tgkill, "SYS_tgkill"), one_of(0, &[own_pid])?),
        ((libc::SYS_prlimit64, "SYS_prlimit64"), prlimit),
        ((libc::SYS_prctl, "SYS_prctl"), one_of(0, PRCTLS)?),
        ((libc::SYS_ioctl, "SYS_ioctl"), one_of(1, IOCTLS)?),
    ])
}

fn compare(
    index: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, length, operator, value)
}

/// Families, types and protocols of sockets. Landlock knows TCP and no protocol that is akin to it, such as MPTCP and SCTP.
const SOCKETS: &[(i32, i32, &[i32])] = &[
    (libc::AF_UNIX, libc::SOCK_STREAM, &[0]),
    (libc::AF_UNIX, libc::SOCK_SEQPACKET, &[0]),
    (libc::AF_UNIX, libc::SOCK_DGRAM, &[0]),
    (libc::AF_INET, libc::SOCK_STREAM, &[0, libc::IPPROTO_TCP]),
    (libc::AF_INET6, libc::SOCK_STREAM, &[0, libc::IPPROTO_TCP]),
    // Names are asked for over UDP, and sorted by what connect(2) says of the way to each address.
    (libc::AF_INET, libc::SOCK_DGRAM, &[0, libc::IPPROTO_UDP]),
    (libc::AF_INET6, libc::SOCK_DGRAM, &[0, libc::IPPROTO_UDP]),
    // getaddrinfo(3) asks for the addresses of this host.
    (libc::AF_NETLINK, libc::SOCK_RAW, &[libc::NETLINK_ROUTE]),
    (libc::AF_NETLINK, libc::SOCK_DGRAM, &[libc::NETLINK_ROUTE]),
    (libc::AF_VSOCK, libc::SOCK_STREAM, &[0]),
    (libc::AF_VSOCK, libc::SOCK_SEQPACKET, &[0]),
];

const PRCTLS: &[i64] = &[
    libc::PR_SET_NAME as i64,
    libc::PR_GET_NAME as i64,
    // glibc names memory of its own where the kernel lets it.
    libc::PR_SET_VMA as i64,
    // PR_GET_AUXV of include/uapi/linux/prctl.h: rustix asks for the size of a page.
    0x4155_5856,
];

const IOCTLS: &[i64] = &[
    libc::FIONBIO as i64,
    libc::FIOCLEX as i64,
    libc::FIONREAD as i64,
    libc::TIOCOUTQ as i64,
    // Whether stderr is a terminal.
    libc::TCGETS as i64,
    libc::TIOCGWINSZ as i64,
    // The resolver makes a number of the interface in `nameserver fe80::1%eth0`.
    libc::SIOCGIFINDEX as i64,
    // IOCTL_VM_SOCKETS_GET_LOCAL_CID of include/uapi/linux/vm_sockets.h, on a socket.
    0x7b9,
];

fn architecture() -> Result<TargetArch, FilterError> {
    let known = cfg!(any(target_arch = "x86_64", target_arch = "aarch64"));
    let unknown = FilterError::Architecture(std::env::consts::ARCH);
    if !known {
        return Err(unknown);
    }
    std::env::consts::ARCH.try_into().map_err(|_| unknown)
}

/// The filter that says what the kernel seems not to have.
///
/// A filter of its own, as one has one answer for all that it knows; of two filters the stricter answer counts.
fn unavailable() -> Result<BpfProgram, FilterError> {
    let calls = UNTRAPPED.iter().chain(UNTRAPPED_LEGACY);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls.map(|(number, _)| (*number, Vec::new())).collect();
    rules.insert(libc::SYS_clone, vec![makes_a_thread(0)?]);
    let refuse = SeccompAction::Errno(libc::ENOSYS as u32);
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture()?)?.try_into()?)
}

/// The filter of everything else: what stands on a list, and what becomes of the rest.
fn listed(unlisted: Unlisted) -> Result<BpfProgram, FilterError> {
    let always = ALLOWED.iter().chain(LEGACY).chain(UNTRAPPED);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        always.map(|(number, _)| (*number, Vec::new())).collect();
    // musl's raise(3), and so abort(3).
    #[cfg(target_env = "musl")]
    rules.insert(libc::SYS_tkill, Vec::new());
    rules.extend(
        by_argument()?
            .into_iter()
            .map(|((number, _), rules)| (number, rules)),
    );
    let unlisted = match unlisted {
        Unlisted::Trapped => {
            // A trap is stricter than the answer of the other filter, which is to count here.
            for (number, _) in UNTRAPPED_LEGACY {
                rules.insert(*number, Vec::new());
            }
            rules.insert(libc::SYS_clone, Vec::new());
            SeccompAction::Trap
        }
        Unlisted::Logged => {
            let thread = i64::from(libc::CLONE_THREAD) as u64;
            rules.insert(libc::SYS_clone, vec![makes_a_thread(thread)?]);
            SeccompAction::Log
        }
    };
    Ok(SeccompFilter::new(rules, unlisted, SeccompAction::Allow, architecture()?)?.try_into()?)
}

/// CLONE_THREAD is `thread`: itself or 0.
fn makes_a_thread(thread: u64) -> Result<SeccompRule, BackendError> {
    let mask = i64::from(libc::CLONE_THREAD) as u64;
    SeccompRule::new(vec![compare(0, Dword, MaskedEq(mask), thread)?])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_call_stands_on_one_list() {
        let mut seen = BTreeSet::new();
        let conditional: Vec<Call> = by_argument().unwrap().into_iter().map(|(call, _)| call).collect();
        for (number, name) in ALLOWED
            .iter()
            .chain(LEGACY)
            .chain(UNTRAPPED)
            .chain(REFUSED)
            .chain(&conditional)
        {
            assert!(seen.insert(*number), "{name} stands twice");
        }
    }

    #[test]
    fn the_rules_make_programs_that_the_kernel_takes() {
        // BPF_MAXINSNS of include/uapi/linux/bpf_common.h.
        const MOST: usize = 4096;
        for unlisted in [Unlisted::Trapped, Unlisted::Logged] {
            assert!((100..MOST).contains(&listed(unlisted).unwrap().len()));
        }
        assert!(!unavailable().unwrap().is_empty());
    }

    #[test]
    fn calls_have_the_names_of_their_manual_pages() {
        assert_eq!(name(libc::SYS_execve), Some("execve"));
        assert_eq!(name(libc::SYS_mprotect), Some("mprotect"));
        assert_eq!(name(crate::sys::sigsys::UNKNOWN), None);
    }
}
