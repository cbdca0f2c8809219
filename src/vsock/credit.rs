//! Credit: how many payload bytes may be under way in each direction (virtio 1.2, section 5.10.6.3).
//!
//! Counters are free-running and wrap at 2^32; differences of them are taken modulo 2^32 and then judged as signed
//! numbers, because a guest may shrink `buf_alloc` below what is already under way.

/// Largest window we use towards a peer, whatever it offers. Keeps every legal difference of counters far from 2^31,
/// so that "negative" can be told from "large".
const MAX_WINDOW: u32 = 1 << 30;

/// A peer claims to have consumed bytes that were never sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BeyondSent;

/// A peer sent more than it was promised room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exceeded;

/// Room at the guest: what we may still send.
#[derive(Clone, Copy, Debug)]
pub struct SendCredit {
    /// Payload bytes sent, ever. Written by us.
    tx_cnt: u32,
    /// The guest's receive buffer, as last told.
    peer_buf_alloc: u32,
    /// Payload bytes the guest has consumed, as last told.
    peer_fwd_cnt: u32,
}

impl SendCredit {
    /// No room until the guest's first header tells of some.
    pub fn new() -> SendCredit {
        SendCredit {
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
        }
    }

    /// Takes `buf_alloc` and `fwd_cnt` of a header of this connection.
    pub fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<(), BeyondSent> {
        // In flight is at most MAX_WINDOW, so a "negative" difference can only mean a claim beyond tx_cnt.
        if self.tx_cnt.wrapping_sub(fwd_cnt).cast_signed() < 0 {
            return Err(BeyondSent);
        }
        self.peer_buf_alloc = buf_alloc;
        self.peer_fwd_cnt = fwd_cnt;
        Ok(())
    }

    /// Counts `n` payload bytes sent. The caller keeps to [`SendCredit::room`].
    pub fn sent(&mut self, n: u32) {
        debug_assert!(n <= self.room(), "sent {n} with room for {}", self.room());
        self.tx_cnt = self.tx_cnt.wrapping_add(n);
    }

    /// The most bytes that can be under way at once: no message may be longer.
    pub fn window(&self) -> u32 {
        self.peer_buf_alloc.min(MAX_WINDOW)
    }

    /// Payload bytes that may be sent now. With `buf_alloc` 65536, 50000 sent and 20000 consumed, 35536; if the guest
    /// then shrinks `buf_alloc` to 16384, the signed room is -13616 and this is 0.
    pub fn room(&self) -> u32 {
        let window = i64::from(self.window());
        let in_flight = i64::from(self.tx_cnt.wrapping_sub(self.peer_fwd_cnt));
        u32::try_from((window - in_flight).max(0)).unwrap_or(0)
    }
}

impl Default for SendCredit {
    fn default() -> Self {
        SendCredit::new()
    }
}

/// Room promised to the guest: what it may still send us.
#[derive(Clone, Copy, Debug)]
pub struct RecvCredit {
    /// The promise, in bytes. Constant for a connection's life.
    buf_alloc: u32,
    /// Payload bytes received, ever.
    rx_cnt: u32,
    /// Payload bytes the host socket took, ever.
    fwd_cnt: u32,
    /// `fwd_cnt` as last told to the guest.
    last_fwd_cnt: u32,
}

impl RecvCredit {
    /// A promise of `buf_alloc` bytes.
    pub fn new(buf_alloc: u32) -> RecvCredit {
        RecvCredit {
            buf_alloc,
            rx_cnt: 0,
            fwd_cnt: 0,
            last_fwd_cnt: 0,
        }
    }

    /// Counts `n` payload bytes received, or refuses them: more than was promised.
    pub fn receive(&mut self, n: u32) -> Result<(), Exceeded> {
        if u64::from(self.held()) + u64::from(n) > u64::from(self.buf_alloc) {
            return Err(Exceeded);
        }
        self.rx_cnt = self.rx_cnt.wrapping_add(n);
        Ok(())
    }

    /// Counts `n` bytes that the host socket took.
    pub fn forwarded(&mut self, n: u32) {
        debug_assert!(n <= self.held(), "forwarded {n} of {} held", self.held());
        self.fwd_cnt = self.fwd_cnt.wrapping_add(n.min(self.held()));
    }

    /// The promise, in bytes.
    pub fn window(&self) -> u32 {
        self.buf_alloc
    }

    /// Bytes received and not yet taken by the host socket; never more than `buf_alloc`.
    pub fn held(&self) -> u32 {
        self.rx_cnt.wrapping_sub(self.fwd_cnt)
    }

    /// `(buf_alloc, fwd_cnt)` for a header that is about to be sent.
    pub fn announce(&mut self) -> (u32, u32) {
        self.last_fwd_cnt = self.fwd_cnt;
        (self.buf_alloc, self.fwd_cnt)
    }

    /// Bytes that the host socket took and the guest has not been told of.
    pub fn news(&self) -> u32 {
        self.fwd_cnt.wrapping_sub(self.last_fwd_cnt)
    }

    /// Whether the guest should be told of new room although nothing else is to be said.
    ///
    /// Half the window is news enough. Before that, only a guest that is short of room needs to hear: at once when
    /// everything was taken (nothing else would ever trigger an update), else in steps that are worth a packet.
    pub fn update_owed(&self) -> bool {
        let news = self.news();
        if news == 0 {
            return false;
        }
        let room_in_its_eyes = self
            .buf_alloc
            .saturating_sub(self.rx_cnt.wrapping_sub(self.last_fwd_cnt));
        let short = room_in_its_eyes < super::header::MAX_PACKET_PAYLOAD.min(self.buf_alloc / 2);
        news >= self.buf_alloc / 2 || (short && (self.held() == 0 || news >= self.buf_alloc / 4))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_clamped_when_the_guest_shrinks_its_buffer() {
        let mut credit = SendCredit::new();
        credit.update(65536, 0).unwrap();
        credit.sent(50000);
        credit.update(65536, 20000).unwrap();
        assert_eq!(credit.room(), 35536);
        credit.update(16384, 20000).unwrap();
        assert_eq!(credit.room(), 0);
        credit.update(16384, 50000).unwrap();
        assert_eq!(credit.room(), 16384);
    }

    #[test]
    fn counters_wrap() {
        let mut credit = SendCredit {
            tx_cnt: u32::MAX - 10,
            peer_buf_alloc: 100,
            peer_fwd_cnt: u32::MAX - 10,
        };
        credit.sent(50);
        assert_eq!(credit.room(), 50);
        credit.update(100, 39).unwrap();
        assert_eq!(credit.room(), 100);
        let mut recv = RecvCredit {
            buf_alloc: 100,
            rx_cnt: u32::MAX,
            fwd_cnt: u32::MAX,
            last_fwd_cnt: u32::MAX,
        };
        recv.receive(100).unwrap();
        assert_eq!(recv.receive(1), Err(Exceeded));
        recv.forwarded(100);
        assert_eq!((recv.held(), recv.announce()), (0, (100, 99)));
    }

    #[test]
    fn a_claim_beyond_what_was_sent_is_refused() {
        let mut credit = SendCredit::new();
        credit.update(1000, 0).unwrap();
        credit.sent(10);
        assert_eq!(credit.update(1000, 11), Err(BeyondSent));
        assert_eq!(credit.room(), 990);
    }

    #[test]
    fn a_huge_window_is_used_only_so_far() {
        let mut credit = SendCredit::new();
        credit.update(u32::MAX, 0).unwrap();
        assert_eq!(credit.room(), MAX_WINDOW);
        credit.sent(MAX_WINDOW);
        assert_eq!(credit.room(), 0);
        credit.update(u32::MAX, MAX_WINDOW).unwrap();
        assert_eq!(credit.room(), MAX_WINDOW);
    }

    #[test]
    fn an_update_is_owed_at_half_the_window_and_when_a_short_guest_was_drained() {
        let mut recv = RecvCredit::new(256 * 1024);
        recv.receive(64 * 1024).unwrap();
        recv.forwarded(64 * 1024);
        assert!(!recv.update_owed(), "the guest still sees 192 KiB");
        recv.receive(64 * 1024).unwrap();
        recv.forwarded(64 * 1024);
        assert!(recv.update_owed());
        recv.announce();
        assert!(!recv.update_owed());
        // A guest that filled the whole window hears of small progress only when it was drained.
        recv.receive(256 * 1024).unwrap();
        recv.forwarded(1000);
        assert!(!recv.update_owed());
        recv.forwarded(64 * 1024);
        assert!(recv.update_owed());
        let mut small = RecvCredit::new(4096);
        small.receive(4096).unwrap();
        small.forwarded(1);
        assert!(!small.update_owed());
        small.forwarded(4095);
        assert!(small.update_owed());
    }
}
