//! Counts the futex calls of threads, by a seccomp filter that has somebody asked about futex(2) and about nothing else, who says "go on"
//! (seccomp_unotify(2); Linux 5.5). Unlike perf and ptrace it needs no privilege, and it is for those threads only which the thread
//! that took it on has started.

use std::fs;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};

use crate::support::until;

/// How often threads with such a name have called futex(2).
pub struct Futexes(Arc<Counts>);

struct Counts {
    name: &'static str,
    count: AtomicU64,
    /// The operation of the last one.
    last: AtomicU64,
}

impl Futexes {
    /// Of threads whose names begin so.
    pub fn of_threads(name: &'static str) -> Futexes {
        Futexes(Arc::new(Counts {
            name,
            count: AtomicU64::new(0),
            last: AtomicU64::new(0),
        }))
    }

    pub fn count(&self) -> u64 {
        self.0.count.load(Ordering::Relaxed)
    }

    /// What the last one was for.
    pub fn last(&self) -> &'static str {
        /// `FUTEX_CMD_MASK` of Linux's include/uapi/linux/futex.h: the operation without PRIVATE and CLOCK_REALTIME.
        const OPERATION: u64 = 0x7f;
        match self.0.last.load(Ordering::Relaxed) & OPERATION {
            0 | 9 => "a wait",
            1 | 10 => "to wake somebody",
            _ => "something else",
        }
    }
}

/// Runs this on a thread of its own. The futex calls of threads that it starts are counted until the last of them has ended. `None` if
/// this cannot be had here, which is told.
pub fn counted<T: Send + 'static>(
    futexes: &Futexes,
    start: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let listener = Arc::new(OnceLock::<io::Result<OwnedFd>>::new());
    let (theirs, counts) = (Arc::clone(&listener), Arc::clone(&futexes.0));
    thread::spawn(move || {
        // Not woken but looking: to wake somebody is a futex call, about which nobody could be asked yet.
        until("the filter is there or refused", || theirs.get().is_some());
        if let Some(Ok(listener)) = theirs.get() {
            counts.answer(listener);
        }
    });
    let theirs = Arc::clone(&listener);
    let started = thread::spawn(move || {
        let may_start = theirs.get_or_init(ask_about_futexes).is_ok();
        may_start.then(start)
    });
    let started = started.join().unwrap();
    if let Some(Err(error)) = listener.get() {
        eprintln!(
            "left out: the kernel does not let a process be asked about its system calls here: {error}"
        );
    }
    started
}

impl Counts {
    /// Lets everybody go on who asks, until nobody is left who could.
    fn answer(&self, listener: &OwnedFd) {
        loop {
            let mut ready = [PollFd::new(listener, PollFlags::IN)];
            let polled = poll(&mut ready, None);
            if polled.is_ok() && ready[0].revents().contains(PollFlags::HUP) {
                return;
            }
            let Ok(question) = receive(listener) else { continue };
            let thread = fs::read_to_string(format!("/proc/self/task/{}/comm", question.pid));
            if thread.is_ok_and(|name| name.starts_with(self.name)) {
                self.last.store(question.data.args[1], Ordering::Relaxed);
                self.count.fetch_add(1, Ordering::Relaxed);
            }
            go_on(listener, question.id);
        }
    }
}

/// From now on, the descriptor at hand is where it is asked whether this thread, and those it starts, may call futex(2).
fn ask_about_futexes() -> io::Result<OwnedFd> {
    let statement = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut program = [
        // The number of the call, at offset 0 of `struct seccomp_data`.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_futex as u32,
        ),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    rustix::thread::set_no_new_privs(true)?;
    // SAFETY: the call reads a program of so many instructions, which live until it returns (seccomp(2)).
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: with this flag the result is a descriptor, which is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as RawFd) })
}

/// `_IOWR('!', number, T)` of Linux's include/uapi/linux/seccomp.h, on machines where reading is bit 31 and writing bit 30.
const fn request<T>(number: u32) -> u32 {
    3 << 30 | (size_of::<T>() as u32) << 16 | (b'!' as u32) << 8 | number
}

fn receive(listener: &OwnedFd) -> io::Result<libc::seccomp_notif> {
    // SAFETY: a structure of integers, for which all zeros is a value, and the one that the kernel wants.
    let mut question: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    let number = request::<libc::seccomp_notif>(0);
    // SAFETY: SECCOMP_IOCTL_NOTIF_RECV fills in a structure of this type.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), number as _, &raw mut question) };
    if result == 0 {
        Ok(question)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Fails for who no longer waits, which is as well.
fn go_on(listener: &OwnedFd, id: u64) {
    let mut answer = libc::seccomp_notif_resp {
        id,
        val: 0,
        error: 0,
        flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
    };
    let number = request::<libc::seccomp_notif_resp>(1);
    // SAFETY: SECCOMP_IOCTL_NOTIF_SEND reads a structure of this type.
    unsafe { libc::ioctl(listener.as_raw_fd(), number as _, &raw mut answer) };
}
