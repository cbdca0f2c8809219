//! A split virtqueue as the standard has it (virtio 1.2, section 2.7), from the device's side: what a chain means, where a ring
//! stands, what is written to it. Written without a look at the code that it judges.

use vsock_sidecar::guest::{Access, RingPosition};

use super::memory::{Lack, Ram, Run};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Bytes of a packet's header.
pub const HEADER: usize = 44;
/// Descriptors of an indirect table, and pieces of a chain, at most.
const MAX_TABLE: usize = 1024;
const MAX_PIECES: usize = 2048;

/// What a chain is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Chain {
    /// Its bytes, and of how many descriptors it consists.
    Good(Vec<Run>, usize),
    /// It goes back unused.
    Bad(&'static str),
    /// It needs what is not translated, and nothing else is wrong with it: it waits.
    Lacks,
    /// It waits, or it goes back: what it needs is not translated, and was refused perhaps, or more is wrong with it; or it
    /// consists of very many pages, of which neighbours may count as one.
    Unclear,
}

/// Where a ring's areas are.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub size: u16,
    pub event_idx: bool,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
}

/// The three areas in memory.
pub struct Areas {
    desc: Vec<Run>,
    avail: Vec<Run>,
    used: Vec<Run>,
}

/// The ring and the burst that is going on.
#[derive(Clone, Debug)]
pub struct Model {
    pub layout: Layout,
    pub next_avail: u16,
    pub next_used: u16,
    pub published: u16,
    /// Where it stands is read from memory at the first opportunity.
    unread: Option<RingPosition>,
    kicks_wanted: Option<bool>,
    /// The available index as the burst saw it last.
    avail_idx: u16,
    /// The burst has met an available index that cannot be.
    pub broken: bool,
    /// Where the chain is that the burst has found to wait.
    parked: Option<u16>,
    /// The VMM has refused something at some time.
    pub refused: bool,
}

impl Model {
    pub fn new(layout: Layout, position: RingPosition, translated: bool) -> Model {
        Model {
            layout,
            next_avail: position.next_used,
            next_used: position.next_used,
            published: position.next_used,
            unread: translated.then_some(position),
            kicks_wanted: None,
            avail_idx: 0,
            broken: false,
            parked: None,
            refused: false,
        }
    }

    pub fn position(&self) -> RingPosition {
        self.unread.unwrap_or(RingPosition {
            next_avail: self.next_avail,
            next_used: self.next_used,
        })
    }

    /// The areas, if all of them can be used.
    pub fn areas(&self, ram: &Ram) -> Result<Areas, Lack> {
        let Layout {
            size,
            event_idx,
            desc,
            avail,
            used,
        } = self.layout;
        let (n, event) = (u64::from(size), if event_idx { 2 } else { 0 });
        Ok(Areas {
            desc: ram.runs(desc, 16 * n, Access::Read)?,
            avail: ram.runs(avail, 4 + 2 * n + event, Access::Read)?,
            used: ram.runs(used, 4 + 8 * n + event, Access::Write)?,
        })
    }

    fn read_used_idx(&mut self, ram: &Ram, areas: &Areas) {
        if self.unread.take().is_some() {
            let used = u16_at(ram, &areas.used, 2);
            (self.next_avail, self.next_used, self.published) = (used, used, used);
        }
    }

    /// The available index, if the driver can have got there.
    fn look(&self, ram: &Ram, areas: &Areas) -> Option<u16> {
        let avail = u16_at(ram, &areas.avail, 2);
        let ahead = avail.wrapping_sub(self.published);
        let taken = self.next_avail.wrapping_sub(self.published);
        (ahead <= self.layout.size && ahead >= taken).then_some(avail)
    }

    /// Whether a burst begins.
    pub fn begin(&mut self, ram: &Ram, areas: &Areas) -> bool {
        self.read_used_idx(ram, areas);
        self.broken = false;
        self.parked = None;
        match self.look(ram, areas) {
            Some(avail) => {
                self.avail_idx = avail;
                true
            }
            None => false,
        }
    }

    /// The head of the next chain; it is not taken yet.
    pub fn next_head(&mut self, ram: &Ram, areas: &Areas) -> Option<u16> {
        if self.broken || self.parked == Some(self.next_avail) {
            return None;
        }
        if self.next_avail == self.avail_idx {
            match self.look(ram, areas) {
                Some(avail) => self.avail_idx = avail,
                None => {
                    self.broken = true;
                    return None;
                }
            }
        }
        let slot = usize::from(self.next_avail & (self.layout.size - 1));
        (self.next_avail != self.avail_idx).then(|| u16_at(ram, &areas.avail, 4 + 2 * slot))
    }

    /// The chain that begins with `head`.
    pub fn chain(&self, ram: &Ram, areas: &Areas, head: u16, access: Access) -> Chain {
        let mut walk = Walk {
            ram,
            access,
            runs: Vec::new(),
            bytes: 0,
            descriptors: 0,
            lacks: false,
        };
        match walk.table(&areas.desc, usize::from(self.layout.size), head, true) {
            Err(_) if walk.lacks => return Chain::Unclear,
            Err(why) => return Chain::Bad(why),
            Ok(()) => {}
        }
        let Walk {
            runs,
            bytes,
            descriptors,
            lacks,
            ..
        } = walk;
        if lacks && (self.refused || runs.len() > MAX_PIECES) {
            Chain::Unclear
        } else if lacks {
            Chain::Lacks
        } else if bytes < HEADER as u64 {
            Chain::Bad("no room for a header")
        } else if runs.len() <= MAX_PIECES {
            Chain::Good(runs, descriptors)
        } else if ram.pages.is_some() {
            Chain::Unclear
        } else {
            Chain::Bad("too many pieces")
        }
    }

    /// The next chain waits: nothing comes out of the ring until the burst is over.
    pub fn park(&mut self) {
        self.parked = Some(self.next_avail);
    }

    /// Whether the burst, which is over, has left a chain that waits.
    pub fn is_parked(&self) -> bool {
        self.parked == Some(self.next_avail)
    }

    /// The chain `head` goes back, the first one that is taken and not used.
    pub fn use_chain(&mut self, ram: &mut Ram, areas: &Areas, head: u16, len: u32) {
        let slot = usize::from(self.next_used & (self.layout.size - 1));
        ram.write(&areas.used, 4 + 8 * slot, &u32::from(head).to_le_bytes());
        ram.write(&areas.used, 8 + 8 * slot, &len.to_le_bytes());
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// The end of a burst; how many chains went back.
    pub fn publish(&mut self, ram: &mut Ram, areas: &Areas) -> u16 {
        self.next_avail = self.next_used;
        let used = self.next_used.wrapping_sub(self.published);
        if used > 0 {
            ram.write(&areas.used, 2, &self.next_used.to_le_bytes());
            self.published = self.next_used;
        }
        used
    }

    /// Kicks are asked for; whether there are entries already, or `None` if the available index cannot be.
    pub fn enable_kicks(&mut self, ram: &mut Ram, areas: &Areas) -> Option<bool> {
        self.read_used_idx(ram, areas);
        if self.layout.event_idx {
            let at = 4 + 8 * usize::from(self.layout.size);
            ram.write(&areas.used, at, &self.next_avail.to_le_bytes());
        } else if self.kicks_wanted != Some(true) {
            ram.write(&areas.used, 0, &[0, 0]);
            self.kicks_wanted = Some(true);
        }
        self.look(ram, areas).map(|avail| avail != self.next_avail)
    }

    /// Whether kicks are to be asked for no more by a write.
    pub fn disable_kicks(&mut self, ram: &mut Ram, areas: &Areas) {
        if !self.layout.event_idx && self.kicks_wanted != Some(false) {
            ram.write(&areas.used, 0, &[1, 0]);
            self.kicks_wanted = Some(false);
        }
    }

    /// The same ring, or one in its place: what the VMM has said stands.
    pub fn keep_refusals(&mut self, before: &Model) {
        self.refused = before.refused;
    }

    /// The same ring: what it asked for stands.
    pub fn keep_kicks(&mut self, before: &Model) {
        self.kicks_wanted = before.kicks_wanted;
    }

    /// Whether [`Model::disable_kicks`] looks at the ring at all.
    pub fn disables_by_writing(&self) -> bool {
        !self.layout.event_idx && self.kicks_wanted != Some(false)
    }
}

struct Walk<'a> {
    ram: &'a Ram,
    access: Access,
    runs: Vec<Run>,
    bytes: u64,
    descriptors: usize,
    lacks: bool,
}

impl Walk<'_> {
    /// Follows the chain through a table of descriptors.
    fn table(&mut self, table: &[Run], entries: usize, head: u16, outer: bool) -> Result<(), &'static str> {
        let mut index = usize::from(head);
        for _ in 0..entries {
            if index >= entries {
                return Err("an index is outside of its table");
            }
            let bytes = self.ram.read(table, 16 * index, 16);
            let wire = u128::from_le_bytes(bytes.try_into().expect("16 bytes"));
            let (addr, len) = (wire as u64, (wire >> 64) as u32);
            let (flags, next) = ((wire >> 96) as u16, (wire >> 112) as u16);
            if flags & INDIRECT != 0 {
                if !outer {
                    return Err("a table in a table");
                }
                if flags & NEXT != 0 {
                    return Err("something behind a table");
                }
                let entries = len as usize / 16;
                if len % 16 != 0 || entries == 0 || entries > MAX_TABLE {
                    return Err("a table of a strange length");
                }
                return match self.ram.runs(addr, len.into(), Access::Read) {
                    Ok(table) => self.table(&table, entries, 0, false),
                    Err(Lack::Unmapped) => Err("no memory"),
                    Err(Lack::Missing) => {
                        self.lacks = true;
                        Ok(())
                    }
                };
            }
            self.buffer(addr, len, flags)?;
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = next.into();
        }
        Err(if index >= entries {
            "an index is outside of its table"
        } else {
            "a circle"
        })
    }

    fn buffer(&mut self, addr: u64, len: u32, flags: u16) -> Result<(), &'static str> {
        self.descriptors += 1;
        if (flags & WRITE != 0) != (self.access == Access::Write) {
            return Err("the wrong direction");
        }
        self.bytes += u64::from(len);
        if self.bytes > u64::from(u32::MAX) {
            return Err("4 GiB");
        }
        match self.ram.runs(addr, len.into(), self.access) {
            Ok(runs) => self.runs.extend(runs),
            Err(Lack::Unmapped) => return Err("no memory"),
            Err(Lack::Missing) => self.lacks = true,
        }
        Ok(())
    }
}

fn u16_at(ram: &Ram, runs: &[Run], at: usize) -> u16 {
    let bytes = ram.read(runs, at, 2);
    u16::from_le_bytes(bytes.try_into().expect("two bytes of an area"))
}
