//! Plays rows and compares.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use vsock_sidecar::embedded_guest::{Packet, RX, TX, Violation};
use vsock_sidecar::vsock::{Cid, Op};

use crate::books::{self, Books};
use crate::raw::Raw;
use crate::stage::{GUEST, Stage};
use crate::support::until;
use crate::table::{Answer, Row, Survives, linux};

/// Anonymous memory that the process may have more than after its first guest, in bytes. What allocators keep is in it.
const MEMORY: u64 = 24 << 20;

/// What the process had when nobody was connected but the witness.
struct Baseline {
    descriptors: usize,
    threads: usize,
    memory: u64,
}

/// Plays all rows, one after the other, in one process; says of each how it went, and fails if one did not.
pub fn perform(rows: &[Row]) {
    let stage = Stage::set();
    // Whatever is made once in a process's life is made by the first guest.
    let mut raw = Raw::boot(&stage, linux());
    raw.good_goes_on();
    raw.guest.shut_down().unwrap();
    until_gone(&stage);
    let baseline = Baseline {
        descriptors: stage.sidecar.descriptors(),
        threads: stage.sidecar.threads(),
        memory: stage.sidecar.anonymous_memory(),
    };
    let mut failed = Vec::new();
    for row in rows {
        let began = Instant::now();
        let played = catch_unwind(AssertUnwindSafe(|| judge(&stage, row, &baseline)));
        let word = if played.is_ok() { "ok" } else { "FAILED" };
        println!("{word:6} {:6.2?} {}", began.elapsed(), row.trick);
        if played.is_err() {
            failed.push(row.trick);
            until_gone(&stage);
        }
    }
    assert!(failed.is_empty(), "{} rows failed: {failed:#?}", failed.len());
    let loud = stage
        .sidecar
        .log()
        .lines()
        .filter(|line| line.contains("\"level\":\"ERROR\""))
        .count();
    assert_eq!(
        loud,
        0,
        "nothing that a guest does is an error of ours\n{}",
        stage.sidecar.log_tail()
    );
}

fn judge(stage: &Stage, row: &Row, baseline: &Baseline) {
    let mut raw = Raw::boot(stage, (row.boot)());
    raw.good_goes_on();
    raw.take_heard();
    let log = Log::from_here(stage);
    let before = books::of(&stage.sidecar, "web");
    let of_other = books::of(&stage.sidecar, "other");

    (row.play)(&mut raw);

    // The other guest goes on, whatever became of this one.
    stage.witnesses.went_on_since(stage.witnesses.now());
    let lives = matches!(row.survives, Survives::Connection | Survives::Others);
    if lives {
        // Twice: what the first one's round found ready is answered before the second one's.
        raw.good_goes_on();
        raw.good_goes_on();
        raw.until_taken();
    }
    let over = row.survives == Survives::Reconnect;
    let written = books::settle(&stage.sidecar, "web", &before, row.counted, over);
    if lives {
        raw.good_goes_on();
    }
    assert!(books::agree(&written, row.counted), "the books say {written:?}");
    let in_other = books::settle(&stage.sidecar, "other", &of_other, row.neighbour, false);
    let as_expected = books::agree(&in_other, row.neighbour);
    assert!(as_expected, "the other guest's books say {in_other:?}");
    assert_answer(&row.answer, raw.take_heard());
    stage.sidecar.get("/livez");
    log.tells_of(&written);
    assert_lawful(&mut raw);

    match row.survives {
        Survives::Connection | Survives::Others => {
            // Nothing is lost in the device: it stopped where the driver can see that it is.
            let bases = raw.guest.pause().unwrap();
            for (queue, base) in [RX, TX].into_iter().zip(bases) {
                assert_eq!(
                    base,
                    raw.guest.driver.queue(queue).used_idx(),
                    "ring {queue} stopped elsewhere"
                );
            }
        }
        Survives::Restart => {
            raw.guest.reboot().unwrap();
            raw.open_good();
            raw.good_goes_on();
            raw.guest.pause().unwrap();
        }
        Survives::Reconnect => {
            until_gone(stage);
            let mut next = Raw::boot(stage, linux());
            next.good_goes_on();
            next.guest.pause().unwrap();
        }
    }
    drop(raw);
    until_gone(stage);
    until("no descriptor and no thread is left behind", || {
        stage.sidecar.descriptors() <= baseline.descriptors && stage.sidecar.threads() <= baseline.threads
    });
    let grown = stage.sidecar.anonymous_memory().saturating_sub(baseline.memory);
    assert!(grown < MEMORY, "grew by {grown} bytes");
    stage.witnesses.unharmed();
}

/// Waits until nobody is connected to the hostile guest's socket.
#[track_caller]
fn until_gone(stage: &Stage) {
    stage
        .sidecar
        .until_metric("vsock_session_active", &[("guest", "web")], 0.0);
}

#[track_caller]
fn assert_answer(answer: &Answer, heard: Vec<Packet>) {
    let one_of = |op: Op| {
        assert_eq!(heard.len(), 1, "{heard:?}");
        assert_sound(&heard[0], op);
    };
    match answer {
        Answer::Silence => assert!(heard.is_empty(), "{heard:?}"),
        Answer::Rst => one_of(Op::Rst),
        Answer::Response => one_of(Op::Response),
        Answer::Rsts(count) => {
            assert!(
                count.contains(&(heard.len() as u32)),
                "{} packets: {:?}",
                heard.len(),
                heard.first()
            );
            heard.iter().for_each(|packet| assert_sound(packet, Op::Rst));
        }
        Answer::Seen(_) => {}
    }
}

/// A packet without payload, addressed to this guest.
#[track_caller]
fn assert_sound(packet: &Packet, op: Op) {
    let header = packet.header;
    assert_eq!(
        (header.op, header.len, header.dst_cid),
        (op as u16, 0, Cid(GUEST)),
        "{packet:?}"
    );
}

/// Lines of level WARN that one session may cause: 64 for ports without a rule, one for each kind of fault, and a few.
const LOUD: usize = 96;

/// The log from a moment on.
struct Log<'s> {
    stage: &'s Stage,
    from: u64,
}

impl<'s> Log<'s> {
    fn from_here(stage: &'s Stage) -> Log<'s> {
        let from = std::fs::metadata(stage.sidecar.path("sidecar.log"))
            .unwrap()
            .len();
        Log { stage, from }
    }

    fn text(&self) -> String {
        let mut file = File::open(self.stage.sidecar.path("sidecar.log")).unwrap();
        file.seek(SeekFrom::Start(self.from)).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whatever was counted was logged as well, in the same words, and a guest cannot make it loud.
    #[track_caller]
    fn tells_of(&self, written: &Books) {
        for key in written.keys() {
            let mut words = key.split(' ');
            let field = match (words.next(), words.next(), words.next()) {
                (Some("misbehavior"), Some(kind), _) => format!("\"kind\":\"{kind}\""),
                (Some("vring_errors"), _, Some("avail_index" | "ring_memory")) => "the ring is broken".into(),
                (Some("vring_errors"), _, Some(fault)) => format!("\"fault\":\"{fault}\""),
                (Some("refused" | "closed" | "session_errors"), Some(reason), _) => {
                    format!("\"reason\":\"{reason}\"")
                }
                _ => continue,
            };
            until(&format!("the log tells of {key}"), || {
                self.text().contains(&field)
            });
        }
        let text = self.text();
        assert!(!text.contains("panicked"), "{text}");
        let loud = text
            .lines()
            .filter(|line| line.contains("\"level\":\"WARN\""))
            .count();
        assert!(loud <= LOUD, "{loud} warnings");
    }
}

/// The device broke no rule towards the guest that broke them all.
#[track_caller]
fn assert_lawful(raw: &mut Raw<'_>) {
    let seen = raw.guest.driver.stats().violations;
    // Of chains that were published behind its back the driver knows nothing.
    let by_hand = [Violation::UsedUnknownId, Violation::UsedIndexJump];
    for violation in Violation::ALL {
        let excused = raw.by_hand && by_hand.contains(&violation);
        assert!(excused || seen.count(violation) == 0, "{violation:?}: {seen:?}");
    }
}
