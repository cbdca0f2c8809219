//! What a guest costs another one that it dials, and that does not come to answer.

use super::bench::{Addresses, Bench};
use super::*;
use crate::vsock::Op;

/// Another guest's device that is busy: what it is asked waits.
struct Busy {
    inbox: mpsc::Receiver<Command>,
    _poll: Poll,
}

impl Busy {
    fn new() -> (Busy, Siblings) {
        let poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), token::WAKE).unwrap());
        let (commands, inbox) = mpsc::channel();
        let siblings = Siblings::default();
        let metrics = GuestMetrics::detached(&labels());
        let rules = Rules::new(&[], &[], &["web".to_owned()], &metrics, None);
        let db = Sibling::new(DeviceHandle::new(commands, waker), Arc::new(rules));
        siblings.replace([("db".to_owned(), db)].into());
        (Busy { inbox, _poll: poll }, siblings)
    }

    fn asked(&self) -> Vec<sibling::SiblingRequest> {
        let request = |command| match command {
            Command::Sibling(request) => *request,
            _ => panic!("it is asked for something else"),
        };
        self.inbox.try_iter().map(request).collect()
    }
}

/// The half of the pair that the guest kept stayed open with the other device, and so did what that one had made of the other
/// half: a place among its connections for all of `guestTimeout`, whatever the limits of the one who asked.
#[test]
fn a_guest_that_no_longer_wants_what_it_asked_another_for_is_heard_of_there() {
    let (db, siblings) = Busy::new();
    let mut bench = Bench::with_sibling(Addresses::Iova, siblings);
    let descriptors = Arc::clone(&bench.device.config.quota.descriptors);
    bench.boot();
    bench.send(Op::Request, &[]);
    let asked = db.asked();
    let [request] = &asked[..] else {
        panic!("{} requests", asked.len());
    };
    let would_block = |error: io::Error| error.kind() == io::ErrorKind::WouldBlock;
    assert!(request.stream.read(&mut [0]).is_err_and(would_block), "it waits");
    assert_eq!(descriptors.used(), 2);
    bench.send(Op::Rst, &[]);
    assert_eq!(request.stream.read(&mut [0]).unwrap(), 0, "it is over");
    assert_eq!(descriptors.used(), 1, "one for each end that is open");
    drop(asked);
    bench.crank();
    assert_eq!(descriptors.used(), 0);
}

/// A guest that asks and gives up in a loop has no connection at any time, but each request is two descriptors until the other
/// device gets to it, and descriptors are all guests'.
#[test]
fn a_guest_has_no_more_requests_waiting_with_another_than_it_may_have_connections() {
    let (db, siblings) = Busy::new();
    let mut bench = Bench::with_sibling(Addresses::Iova, siblings);
    let most = bench.device.config.limits.connections;
    bench.boot();
    for _ in 0..3 * most {
        bench.send(Op::Request, &[]);
        bench.send(Op::Rst, &[]);
        bench.sent();
    }
    let asked = db.asked();
    assert_eq!(asked.len(), most);
    let rule = Arc::clone(bench.device.config.rules.outbound(0).unwrap());
    let refused = |reason: RefuseReason| rule.metrics().refused[reason as usize].get();
    assert_eq!(refused(RefuseReason::Limit), 2 * most as u64);
    // When the other device has seen to them, there is room again.
    drop(asked);
    bench.crank();
    bench.send(Op::Request, &[]);
    assert_eq!(db.asked().len(), 1);
}
