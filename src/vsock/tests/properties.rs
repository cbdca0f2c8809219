//! Whatever a guest, host ends and time do in whatever order: bytes arrive complete and in order or the connection
//! ends, nobody waits for nothing, and in the end nothing is left.

use proptest::prelude::*;

use super::linux::Progress;
use super::world::World;
use super::*;

/// What happens next. The first number chooses among the sockets or host ends that there are.
#[derive(Clone, Debug)]
enum Operation {
    GuestConnects {
        reuse: bool,
    },
    GuestWrites(usize, u64),
    GuestReads(usize, u32),
    GuestShuts(usize, u32),
    GuestCloses(usize),
    GuestAborts(usize),
    GuestSetsBuffer(usize, u32),
    /// The guest processes so many packets and posts their buffers.
    GuestPolls(usize),
    HostConnects(u32),
    HostWrites(usize, u64),
    HostTakes(usize, u64),
    HostEnds(usize),
    HostFails(usize),
    HostTakesNoMore(usize),
    Dialled(bool),
    Passes(u64),
    Turn,
    Reboots,
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let which = 0usize..6;
    let bytes = prop_oneof![1u64..100, 1u64..10_000, 1u64..400_000];
    prop_oneof![
        4 => any::<bool>().prop_map(|reuse| GuestConnects { reuse }),
        10 => (which.clone(), bytes.clone()).prop_map(|(s, n)| GuestWrites(s, n)),
        6 => (which.clone(), bytes.clone()).prop_map(|(s, n)| GuestReads(s, n as u32)),
        3 => (which.clone(), 1u32..4).prop_map(|(s, how)| GuestShuts(s, how)),
        3 => which.clone().prop_map(GuestCloses),
        1 => which.clone().prop_map(GuestAborts),
        1 => (which.clone(), prop_oneof![Just(0u32), 1u32..300_000]).prop_map(|(s, n)| GuestSetsBuffer(s, n)),
        10 => (0usize..40).prop_map(GuestPolls),
        3 => (22u32..25).prop_map(HostConnects),
        10 => (which.clone(), bytes.clone()).prop_map(|(s, n)| HostWrites(s, n)),
        8 => (which.clone(), bytes).prop_map(|(s, n)| HostTakes(s, n)),
        3 => which.clone().prop_map(HostEnds),
        1 => which.clone().prop_map(HostFails),
        1 => which.prop_map(HostTakesNoMore),
        6 => prop::bool::weighted(0.9).prop_map(Dialled),
        4 => prop_oneof![1u64..100, 100u64..3000, 3000u64..40_000].prop_map(Passes),
        16 => Just(Turn),
        1 => prop::bool::weighted(0.2).prop_map(|often| if often { Reboots } else { Turn }),
    ]
}

impl World {
    fn does(&mut self, operation: &Operation) {
        use Operation::*;
        let sockets = self.guest.sockets.len();
        let hosts = self.hosts.len();
        // The newest are the ones that live.
        let socket = |s: usize| sockets.checked_sub(1 + s);
        let host = |h: usize| hosts.checked_sub(1 + h);
        match *operation {
            GuestConnects { reuse } => self.guest_connects(reuse),
            GuestWrites(s, n) => {
                if let Some(s) = socket(s) {
                    self.guest.write(s, n);
                }
            }
            GuestReads(s, n) => {
                if let Some(s) = socket(s) {
                    self.guest.read(s, n);
                }
            }
            GuestShuts(s, how) => {
                if let Some(s) = socket(s) {
                    self.guest.shutdown(s, how);
                }
            }
            GuestCloses(s) => {
                if let Some(s) = socket(s) {
                    self.guest.close(self.now, s);
                }
            }
            GuestAborts(s) => {
                if let Some(s) = socket(s) {
                    self.guest.abort(s);
                }
            }
            GuestSetsBuffer(s, n) => {
                if let Some(s) = socket(s) {
                    self.guest.set_buffer(s, n);
                }
            }
            GuestPolls(n) => self.guest_polls(n),
            HostConnects(port) => self.host_connects(port),
            HostWrites(h, n) => {
                if let Some(h) = host(h) {
                    self.host_writes(h, n);
                }
            }
            HostTakes(h, n) => {
                if let Some(h) = host(h) {
                    self.hosts[h].room += n;
                }
            }
            HostEnds(h) => {
                if let Some(h) = host(h) {
                    self.host_ends(h);
                }
            }
            HostFails(h) => {
                if let Some(h) = host(h) {
                    self.host_fails(h);
                }
            }
            HostTakesNoMore(h) => {
                if let Some(h) = host(h) {
                    self.host_takes_no_more(h);
                }
            }
            Dialled(reached) => self.dialled(reached),
            Passes(milliseconds) => self.passes(Duration::from_millis(milliseconds)),
            Turn => self.turn(),
            Reboots => self.reboots(),
        }
    }

    /// Nobody stalls any more: everyone reads, takes, dials and polls until nothing happens.
    fn settles(&mut self) {
        for _ in 0..30_000 {
            while !self.dials.is_empty() {
                self.dialled(true);
            }
            for h in &mut self.hosts {
                h.room = u64::MAX;
            }
            self.turn();
            let idle = self.rx.is_empty() && self.guest.tx.is_empty();
            self.guest_polls(usize::MAX);
            for s in 0..self.guest.sockets.len() {
                self.guest.read(s, u32::MAX);
            }
            if idle && self.guest.tx.is_empty() {
                return;
            }
        }
        panic!("it never settles: {self:?}");
    }

    /// Once nobody stalls, every byte of a live connection has arrived.
    fn assert_nobody_waits(&self) {
        for id in self.mux.ids() {
            let state = self.mux.connection(id).map(|c| c.state());
            assert_ne!(state, Some(State::Draining), "everything was taken");
            assert_ne!(state, Some(State::Dead), "every RST had a buffer");
        }
        for h in self.hosts.iter().filter(|h| h.established && !h.ended) {
            let s = &self.guest.sockets[h.socket.expect("established")];
            if s.progress != Progress::Connected || s.done || !s.linked {
                continue;
            }
            assert_eq!(s.pending, 0, "the guest waits for credit: {s:?} {h:?}");
            if !h.write_failed {
                assert_eq!(h.delivered, s.sent, "{s:?} {h:?}");
                assert_eq!(h.got_eof, s.own_shutdown & 2 != 0, "{s:?} {h:?}");
            }
            // A buffer of nothing at all is the guest's own wish.
            if s.own_shutdown & 1 == 0 && !s.refuses_everything() {
                assert_eq!(h.read, h.written, "the host end waits: {s:?} {h:?}");
                assert_eq!(s.arrived, h.written, "{s:?} {h:?}");
            }
        }
    }

    fn assert_ends_well(mut self) {
        self.settles();
        self.assert_nobody_waits();
        for h in 0..self.hosts.len() {
            self.host_ends(h);
        }
        for s in 0..self.guest.sockets.len() {
            self.guest.close(self.now, s);
        }
        self.settles();
        for _ in 0..3 {
            self.passes(DRAIN_TIMEOUT + A_MOMENT);
            self.settles();
        }
        for h in &self.hosts {
            assert!(h.ended, "invariant 8: {h:?}");
        }
        assert!(self.mux.is_empty(), "{:?}", self.mux);
        assert_eq!(self.mux.poll_timeout(), None);
        let lists = self.mux.list_lengths();
        assert_eq!(
            (lists.replies, lists.data, lists.timers, lists.keys),
            (0, 0, 0, 0)
        );
        assert!(self.guest.sockets.iter().all(|s| !s.linked), "{:?}", self.guest);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_story_ends_well(
        buf_alloc in prop_oneof![Just(1500u32), Just(4096), Just(65_536), Just(OUR_BUF)],
        guest_buf in prop_oneof![Just(1000u32), Just(65_536), Just(OUR_BUF)],
        ring in prop_oneof![Just(1usize), Just(8), Just(128)],
        max_connections in prop_oneof![Just(2usize), Just(64)],
        operations in prop::collection::vec(operation(), 1..120),
    ) {
        let mut world = World::new(MuxerConfig { buf_alloc, max_connections, ..config() }, guest_buf, ring);
        for operation in &operations {
            world.does(operation);
            for id in world.mux.ids() {
                prop_assert!(world.mux.connection(id).is_some_and(|c| c.held() <= buf_alloc));
            }
            prop_assert!(world.mux.len() <= max_connections);
        }
        world.assert_ends_well();
    }
}

/// The same with a firm hand, so that the machinery above is known to move bytes at all.
#[test]
fn a_story_told_by_hand() {
    use Operation::*;
    let mut world = World::new(config(), OUR_BUF, 128);
    for operation in [
        GuestConnects { reuse: false },
        Turn,
        Dialled(true),
        Turn,
        GuestPolls(10),
        GuestWrites(0, 1_000_000),
        HostTakes(0, 2_000_000),
        HostWrites(0, 100_000),
        Turn,
        GuestPolls(128),
    ] {
        world.does(&operation);
    }
    assert_eq!(world.guest.sockets[0].arrived, 100_000);
    assert_eq!(
        world.hosts[0].delivered,
        u64::from(OUR_BUF),
        "all that the first credit allowed"
    );
    world.settles();
    assert_eq!(world.hosts[0].delivered, 1_000_000);
    world.assert_ends_well();
}
