//! What a system call becomes that the seccomp filter traps: an error for its caller, and a count that others can read.
//!
//! The filter's answer SECCOMP_RET_TRAP does not carry the call out and raises SIGSYS in the thread that made it
//! (kernel/seccomp.c). The handler here writes an errno to where the call's result is expected and counts, so that the thread
//! goes on as after any failed call. An errno given by the filter itself (SECCOMP_RET_ERRNO) would be simpler, and nobody would
//! ever learn of it: the kernel tells at most its own log, which the owner of a pod does not see.
//!
//! The kernel kills the process if the thread has SIGSYS blocked at that moment. C libraries block all signals while a
//! thread is made or ends, so a filter must not trap what they call there.

use std::ffi::{c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::{mem, ptr};

use rustix::event::{EventfdFlags, eventfd};

/// Numbers of system calls from here on share the last counter. Linux 7.0 is at 471.
const NUMBERS: usize = 512;

/// How often each number was refused, since the process began.
static REFUSED: [AtomicU64; NUMBERS] = [const { AtomicU64::new(0) }; NUMBERS];
/// A set bit: the filter knows the number and did not like the arguments.
static PARTLY_ALLOWED: [AtomicU64; NUMBERS / 64] = [const { AtomicU64::new(0) }; NUMBERS / 64];
/// The eventfd that is written at each refusal; -1 before [`handle`].
static WAKE: AtomicI32 = AtomicI32::new(-1);

/// `si_code` of a signal that comes from a filter (include/uapi/asm-generic/siginfo.h).
const SYS_SECCOMP: c_int = 1;

/// Handles trapped system calls from now on, for the whole process. A call in `partly_allowed` fails with EPERM, since other
/// arguments would do; any other with ENOSYS, at which C libraries fall back to older calls.
///
/// The eventfd (non-blocking) is readable after a refusal. It stays open for as long as the process lives.
///
/// # Errors
/// Those of eventfd(2), dup(2) and sigaction(2).
pub fn handle(partly_allowed: impl IntoIterator<Item = i64>) -> io::Result<OwnedFd> {
    for number in partly_allowed {
        let number = slot(number);
        if let Some(word) = PARTLY_ALLOWED.get(number / 64) {
            word.fetch_or(1 << (number % 64), Ordering::Relaxed);
        }
    }
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    // The handler's own descriptor is never closed: no other file can ever get its number.
    let ours = wake.try_clone()?;
    if WAKE
        .compare_exchange(-1, ours.as_raw_fd(), Ordering::Relaxed, Ordering::Relaxed)
        .is_err()
    {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "trapped system calls are handled already",
        ));
    }
    mem::forget(ours);

    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: all-zero bytes are a valid sigaction: an integer, an empty set of signals, and no restorer.
    let action = unsafe { action.assume_init_mut() };
    action.sa_sigaction = on_sigsys as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
    // On the alternate stack where the thread has one: the call may have come from there.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: `action` is valid for reads, no old action is asked for. The handler does only what a signal handler may: atomic
    // operations without locks, and write(2) to a descriptor that stays open.
    if unsafe { libc::sigaction(libc::SIGSYS, action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(wake)
}

/// The system calls that were refused since the process began: number and how often. [`UNKNOWN`] stands for all numbers that
/// are too high.
pub fn refused() -> impl Iterator<Item = (i64, u64)> {
    (0..)
        .zip(&REFUSED)
        .map(|(number, count)| (number, count.load(Ordering::Relaxed)))
        .filter(|(_, count)| *count > 0)
}

/// What [`refused`] calls numbers that no kernel of today has.
pub const UNKNOWN: i64 = NUMBERS as i64 - 1;

fn slot(number: i64) -> usize {
    usize::try_from(number).unwrap_or(NUMBERS).min(NUMBERS - 1)
}

/// Runs in the thread whose call was trapped, at any moment: no allocation, no lock, nothing that may panic.
extern "C" fn on_sigsys(_signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo that is valid until the handler returns. `si_code` is common to all
    // kinds of signals.
    let code = unsafe { (*info).si_code };
    if code != SYS_SECCOMP {
        // Somebody's kill(2): there is no call to answer.
        return;
    }
    // SAFETY: with SA_SIGINFO the third argument is the interrupted thread's ucontext_t, valid and ours alone until the
    // handler returns.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let number = slot(call_number(context));
    let known = PARTLY_ALLOWED
        .get(number / 64)
        .is_some_and(|word| word.load(Ordering::Relaxed) & 1 << (number % 64) != 0);
    set_result(context, if known { -libc::EPERM } else { -libc::ENOSYS });
    if let Some(count) = REFUSED.get(number) {
        count.fetch_add(1, Ordering::Relaxed);
    }
    wake();
}

fn wake() {
    let one = 1u64.to_ne_bytes();
    // SAFETY: errno is the thread's own, and what the interrupted code may be about to read: it is put back. `one` is valid for
    // reads of its 8 bytes; the descriptor is an eventfd that is never closed. A full counter (EAGAIN) has woken whoever reads.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        libc::write(WAKE.load(Ordering::Relaxed), one.as_ptr().cast(), one.len());
        *errno = before;
    }
}

// The kernel puts the number back into the register that the result goes to (syscall_rollback in arch/x86/include/asm/syscall.h).
#[cfg(target_arch = "x86_64")]
fn call_number(context: &libc::ucontext_t) -> i64 {
    context.uc_mcontext.gregs[libc::REG_RAX as usize]
}

#[cfg(target_arch = "x86_64")]
fn set_result(context: &mut libc::ucontext_t, result: c_int) {
    context.uc_mcontext.gregs[libc::REG_RAX as usize] = result.into();
}

// Number in x8, result in x0.
#[cfg(target_arch = "aarch64")]
fn call_number(context: &libc::ucontext_t) -> i64 {
    context.uc_mcontext.regs[8] as i64
}

#[cfg(target_arch = "aarch64")]
fn set_result(context: &mut libc::ucontext_t, result: c_int) {
    context.uc_mcontext.regs[0] = i64::from(result) as u64;
}

// No filter is made for other architectures, see `confine::filter`.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn call_number(_: &libc::ucontext_t) -> i64 {
    UNKNOWN
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn set_result(_: &mut libc::ucontext_t, _: c_int) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_no_kernel_has_share_a_counter() {
        assert_eq!(slot(0), 0);
        assert_eq!(slot(471), 471);
        for strange in [-1, i64::MIN, i64::MAX, 512, 0x4000_0000] {
            assert_eq!(slot(strange) as i64, UNKNOWN);
        }
    }
}
