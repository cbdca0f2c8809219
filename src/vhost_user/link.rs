//! What the crate's thread uses to reach the others: commands to the device thread, and the alarm that ends a session.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::oneshot;

use crate::device::handle::Reply;
use crate::device::{Command, DeviceGone, DeviceHandle};

use super::negotiation::{NegotiationWatch, QUEUES, SessionError};
use super::translation::{AddressNote, RingIovas};

/// How long the device thread may take for a command. It answers within a turn; when it does not, the VMM, which waits
/// for us with its global lock held, is better served by a closed connection.
const DEVICE_DEADLINE: Duration = Duration::from_secs(10);

/// Locks a mutex, poisoned or not: what it protects are values that no panic leaves half written.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes a thread out of `poll`.
#[derive(Debug)]
pub(super) struct WakeFd(OwnedFd);

impl WakeFd {
    pub(super) fn new() -> io::Result<WakeFd> {
        Ok(WakeFd(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// Makes the descriptor readable until [`WakeFd::clear`].
    pub(super) fn wake(&self) {
        // Fails only when the counter is full, and then the descriptor is readable already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(super) fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl Wake for WakeFd {
    fn wake(self: Arc<Self>) {
        WakeFd::wake(&self);
    }
}

/// A command whose answer is due.
pub(super) struct Pending<T> {
    /// What the device does, for the alarm.
    what: &'static str,
    answer: oneshot::Receiver<T>,
    pub(super) deadline: Instant,
}

impl AsFd for WakeFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Why a session has to end, as found by a thread that cannot end it.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) kind: SessionError,
    pub(super) detail: String,
}

/// One session's link to the device thread, used by the crate's thread.
pub(super) struct DeviceLink {
    /// Name of the guest, for logs.
    pub(super) guest: Arc<str>,
    /// Where ring starts and stops are told.
    pub(super) watch: Arc<NegotiationWatch>,
    /// How the SET_VRING_ADDRs that the crate is about to read are meant, by virtqueue and in their order. Bounded by the
    /// messages that fit into the private socket.
    addresses: Mutex<[VecDeque<Option<RingIovas>>; QUEUES]>,
    device: DeviceHandle,
    deadline: Duration,
    /// The first failure; later ones follow from it.
    failure: Mutex<Option<Failure>>,
    /// Wakes the session thread.
    wake: Arc<WakeFd>,
    /// Whether the crate's thread runs (no longer).
    thread_ended: Arc<AtomicBool>,
}

impl DeviceLink {
    pub(super) fn new(
        guest: Arc<str>,
        device: DeviceHandle,
        watch: Arc<NegotiationWatch>,
        wake: Arc<WakeFd>,
    ) -> DeviceLink {
        DeviceLink {
            guest,
            watch,
            addresses: Mutex::default(),
            device,
            deadline: DEVICE_DEADLINE,
            failure: Mutex::new(None),
            wake,
            thread_ended: Arc::new(AtomicBool::new(false)),
        }
    }

    #[cfg(test)]
    pub(super) fn with_deadline(mut self, deadline: Duration) -> DeviceLink {
        self.deadline = deadline;
        self
    }

    /// Sends a command whose answer is awaited elsewhere. An error has raised the alarm.
    pub(super) fn begin<T>(
        &self,
        what: &'static str,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<Pending<T>, DeviceGone> {
        let (reply, answer) = oneshot::channel();
        self.device
            .send(command(reply))
            .inspect_err(|_| self.alarm_gone(what))?;
        Ok(Pending {
            what,
            answer,
            deadline: Instant::now() + self.deadline,
        })
    }

    /// Looks for the answer of a command; the session thread is woken when it comes. `Err` has raised the alarm.
    pub(super) fn poll<T>(&self, pending: &mut Pending<T>) -> Result<Option<T>, DeviceGone> {
        let waker = Waker::from(self.wake.clone());
        match Pin::new(&mut pending.answer).poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(Ok(value)) => Ok(Some(value)),
            Poll::Ready(Err(_)) => {
                self.alarm_gone(pending.what);
                Err(DeviceGone)
            }
            Poll::Pending if Instant::now() < pending.deadline => Ok(None),
            Poll::Pending => {
                self.alarm_late(pending.what);
                Err(DeviceGone)
            }
        }
    }

    /// Sends a command that has no answer. An error has raised the alarm.
    pub(super) fn tell(&self, what: &str, command: Command) {
        if self.device.send(command).is_err() {
            self.alarm_gone(what);
        }
    }

    fn alarm_gone(&self, what: &str) {
        match self.has_device() {
            true => self.alarm_restarted(&format!("{what} was not done")),
            false => self.alarm(
                SessionError::Io,
                format!("the device thread has ended, {what} was not done"),
            ),
        }
    }

    /// The device has panicked, begun anew, and knows nothing of this session.
    pub(super) fn alarm_restarted(&self, but: &str) {
        let detail = format!(
            "the device thread has panicked, which its own line in the log tells, and begun anew: {but}"
        );
        self.alarm(SessionError::Panic, detail);
    }

    /// Whether there is a device thread.
    pub(super) fn has_device(&self) -> bool {
        let (reply, _) = oneshot::channel();
        self.device.send(Command::Ping(reply)).is_ok()
    }

    fn alarm_late(&self, what: &str) {
        let after = self.deadline;
        self.alarm(
            SessionError::Timeout,
            format!("the device thread did not {what} within {after:?}"),
        );
    }

    /// Sends a command and blocks until the device has answered. An error has raised the alarm.
    pub(super) fn call<T>(
        &self,
        what: &str,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, DeviceGone> {
        if self.failure().is_some() {
            // The device did not answer before; waiting for it again would only double the time.
            return Err(DeviceGone);
        }
        self.call_after_failure(what, command)
    }

    /// [`DeviceLink::call`] even when the alarm has been raised: the end of a session is told in any case.
    pub(super) fn call_after_failure<T>(
        &self,
        what: &str,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, DeviceGone> {
        let (reply, answer) = oneshot::channel();
        let answer = match self.device.send(command(reply)) {
            Ok(()) => block_on(answer, Instant::now() + self.deadline),
            Err(DeviceGone) => Answer::Gone,
        };
        match answer {
            Answer::Value(value) => Ok(value),
            Answer::Gone => {
                self.alarm_gone(what);
                Err(DeviceGone)
            }
            Answer::Late => {
                self.alarm_late(what);
                Err(DeviceGone)
            }
        }
    }

    /// To be told before the crate can read a SET_VRING_ADDR.
    pub(super) fn note(&self, note: AddressNote) {
        if let Some(notes) = lock(&self.addresses).get_mut(note.index) {
            notes.push_back(note.iovas);
        }
    }

    /// How the SET_VRING_ADDR that the crate serves now is meant: as I/O virtual addresses, if there are any.
    pub(super) fn noted(&self, index: usize) -> Option<RingIovas> {
        lock(&self.addresses).get_mut(index)?.pop_front().flatten()
    }

    /// Ends the session, from any thread.
    pub(super) fn alarm(&self, kind: SessionError, detail: String) {
        lock(&self.failure).get_or_insert(Failure { kind, detail });
        WakeFd::wake(&self.wake);
    }

    /// The first failure, if there is one.
    pub(super) fn failure(&self) -> Option<Failure> {
        lock(&self.failure).clone()
    }

    /// Whether the crate's thread has ended.
    pub(super) fn thread_ended(&self) -> bool {
        self.thread_ended.load(Ordering::Acquire)
    }

    /// To be called first on every entry from the crate's thread.
    ///
    /// Should that thread panic, the daemon keeps a duplicate of its socket open and nobody would see the end
    /// (`ConnectionState` in vhost-user-backend); a thread-local value's destructor runs however a thread ends.
    pub(super) fn enter(&self) {
        thread_local! {
            static END: std::cell::RefCell<Option<EndOfThread>> = const { std::cell::RefCell::new(None) };
        }
        let _ = END.try_with(|end| {
            if let Ok(mut end) = end.try_borrow_mut()
                && !end
                    .as_ref()
                    .is_some_and(|end| Arc::ptr_eq(&end.ended, &self.thread_ended))
            {
                *end = Some(EndOfThread {
                    ended: self.thread_ended.clone(),
                    wake: self.wake.clone(),
                });
            }
        });
    }
}

/// Tells the session thread that the thread it lives in has ended.
struct EndOfThread {
    ended: Arc<AtomicBool>,
    wake: Arc<WakeFd>,
}

impl Drop for EndOfThread {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        WakeFd::wake(&self.wake);
    }
}

enum Answer<T> {
    Value(T),
    Gone,
    Late,
}

/// Waits for an answer by parking this thread: `blocking_recv` knows no deadline.
fn block_on<T>(mut answer: oneshot::Receiver<T>, deadline: Instant) -> Answer<T> {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match Pin::new(&mut answer).poll(&mut context) {
            Poll::Ready(Ok(value)) => return Answer::Value(value),
            Poll::Ready(Err(_)) => return Answer::Gone,
            Poll::Pending => {}
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Answer::Late;
        }
        std::thread::park_timeout(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::testing;

    #[test]
    fn a_call_waits_for_the_answer() {
        let (link, device) = testing::link();
        std::thread::scope(|scope| {
            let caller = scope.spawn(|| link.call("end", |done| Command::EndSession { done }));
            let Ok(Command::EndSession { done }) = device.commands.recv() else {
                panic!("another command")
            };
            assert!(!caller.is_finished());
            done.send(()).unwrap();
            assert_eq!(caller.join().unwrap(), Ok(()));
        });
        assert!(link.failure().is_none());
        assert!(!device.was_woken());
    }

    #[test]
    fn a_device_that_has_ended_raises_the_alarm() {
        let (link, mut device) = testing::link();
        device.commands = std::sync::mpsc::channel().1;
        assert_eq!(
            link.call("stop a ring", |done| Command::StopQueue {
                index: 0,
                pause: false,
                done
            }),
            Err(DeviceGone)
        );
        let failure = link.failure().unwrap();
        assert_eq!(
            (failure.kind, failure.detail.as_str()),
            (
                SessionError::Io,
                "the device thread has ended, stop a ring was not done"
            )
        );
        assert!(device.was_woken());
    }

    /// A device that drops a command has not done it.
    #[test]
    fn a_command_that_is_dropped_is_a_device_that_has_ended() {
        let (link, device) = testing::link();
        std::thread::scope(|scope| {
            let caller = scope.spawn(|| link.call("end", |done| Command::EndSession { done }));
            drop(device.commands.recv());
            assert_eq!(caller.join().unwrap(), Err(DeviceGone));
        });
    }

    #[test]
    fn a_device_that_hangs_is_given_up_once() {
        let (link, _device) = testing::link();
        let link = link.with_deadline(Duration::from_millis(20));
        assert!(
            link.call("stop a ring", |done| Command::StopQueue {
                index: 0,
                pause: false,
                done
            })
            .is_err()
        );
        assert_eq!(link.failure().unwrap().kind, SessionError::Timeout);
        // What follows does not wait again, and does not hide the first failure.
        let link = link.with_deadline(Duration::from_secs(3600));
        assert!(link.call("end", |done| Command::EndSession { done }).is_err());
        link.alarm(SessionError::Io, "later".into());
        assert_eq!(
            link.failure().unwrap().detail,
            "the device thread did not stop a ring within 20ms"
        );
    }

    #[test]
    fn the_end_of_the_crates_thread_is_seen_even_when_it_panics() {
        let (link, device) = testing::link();
        let link = Arc::new(link);
        let thread = std::thread::spawn({
            let link = Arc::clone(&link);
            move || {
                link.enter();
                link.enter();
                std::panic::resume_unwind(Box::new("as if"));
            }
        });
        assert!(thread.join().is_err());
        assert!(link.thread_ended());
        assert!(device.was_woken());
    }
}
