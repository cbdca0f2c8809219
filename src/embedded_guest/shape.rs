//! How a packet lies in memory: which descriptors hold its bytes. Guest kernels differ, the standard allows anything.

use super::memory::PAGE;
use super::virtqueue::Table;
use crate::vsock::header::HEADER_LEN;

/// How a TX packet is cut into descriptors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shape {
    cuts: Cuts,
    /// Whether an indirect table is used.
    pub(super) table: Table,
    /// Whether the pieces are kept apart in memory, the last at the lowest address, rather than side by side.
    pub(super) scattered: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Cuts {
    /// After these lengths; the last piece takes the rest.
    Lengths(Vec<u32>),
    /// Header, then page by page, the first page from `offset`.
    Pages { offset: u32 },
    /// Everything in pieces of this length.
    Every(u32),
}

impl Shape {
    /// Header and payload in one descriptor.
    pub fn single() -> Shape {
        Shape::cuts(&[])
    }

    /// `[44][n]`: Linux up to 6.11 for every packet, later kernels up to 32 KiB.
    pub fn header_then_payload() -> Shape {
        Shape::cuts(&[HEADER_LEN as u32])
    }

    /// `[44][32768][rest]`: Linux 6.12 and later, whose skb fragments hold 32 KiB; shorter packets as before.
    pub fn linux_6_12() -> Shape {
        Shape::cuts(&[HEADER_LEN as u32, 32 * 1024]).scattered()
    }

    /// `[44]` and fragments of user pages from `offset` within the first: MSG_ZEROCOPY. A 64 KiB payload has 17
    /// fragments unless `offset` is 0.
    pub fn page_fragments(offset: u32) -> Shape {
        Shape {
            cuts: Cuts::Pages {
                offset: offset % PAGE as u32,
            },
            table: Table::AsLinux,
            scattered: true,
        }
    }

    /// The header in `pieces` parts (1 to 44), then the payload in one.
    pub fn split_header(pieces: u32) -> Shape {
        let pieces = pieces.clamp(1, HEADER_LEN as u32);
        let mut lengths = vec![HEADER_LEN as u32 / pieces; pieces as usize];
        if let Some(last) = lengths.last_mut() {
            *last += HEADER_LEN as u32 % pieces;
        }
        Shape::cuts(&lengths).scattered()
    }

    /// Cut after these lengths; what is left is one more piece. Zero lengths make empty descriptors.
    pub fn cuts(lengths: &[u32]) -> Shape {
        Shape {
            cuts: Cuts::Lengths(lengths.to_vec()),
            table: Table::AsLinux,
            scattered: false,
        }
    }

    /// Pieces of `len` bytes each, header and payload without distinction.
    pub fn every(len: u32) -> Shape {
        Shape {
            cuts: Cuts::Every(len.max(1)),
            table: Table::AsLinux,
            scattered: true,
        }
    }

    /// The same through an indirect table, negotiated or not.
    #[must_use]
    pub fn indirect(mut self) -> Shape {
        self.table = Table::Indirect;
        self
    }

    /// The same in the ring's own descriptors.
    #[must_use]
    pub fn direct(mut self) -> Shape {
        self.table = Table::Direct;
        self
    }

    /// The same with the pieces kept apart in memory.
    #[must_use]
    pub fn scattered(mut self) -> Shape {
        self.scattered = true;
        self
    }

    /// The lengths of the pieces of a packet of `total` bytes, header included.
    pub(super) fn pieces(&self, total: usize, pieces: &mut Vec<u32>) {
        pieces.clear();
        let mut left = total as u32;
        let mut take = |len: u32, left: &mut u32| {
            let len = len.min(*left);
            pieces.push(len);
            *left -= len;
        };
        match &self.cuts {
            Cuts::Lengths(lengths) => {
                for len in lengths {
                    if left == 0 {
                        break;
                    }
                    take(*len, &mut left);
                }
                if left > 0 {
                    take(u32::MAX, &mut left);
                }
            }
            Cuts::Pages { offset } => {
                take(HEADER_LEN as u32, &mut left);
                if left > 0 {
                    take(PAGE as u32 - offset, &mut left);
                }
                while left > 0 {
                    take(PAGE as u32, &mut left);
                }
            }
            Cuts::Every(len) => {
                while left > 0 {
                    take(*len, &mut left);
                }
            }
        }
    }
}

/// How a receive buffer is laid out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RxLayout {
    /// `[44][4096]`: Linux up to 6.1.
    TwoDescriptors,
    /// One descriptor of this many bytes, header included: 3776 in Debian's 6.1 and 6.12, 4140 in 6.2 to 6.16,
    /// 65580 for a guest with large buffers.
    OneDescriptor(u32),
    /// Any pieces.
    Pieces(Vec<u32>),
}

impl RxLayout {
    /// What Debian's guests post: one descriptor, 44 bytes of header and 3732 of payload.
    pub const LINUX_6_12: RxLayout = RxLayout::OneDescriptor(3776);

    /// One descriptor for a header and `payload` bytes.
    pub fn for_payload(payload: u32) -> RxLayout {
        RxLayout::OneDescriptor(HEADER_LEN as u32 + payload)
    }

    pub(super) fn pieces(&self) -> Vec<u32> {
        match self {
            RxLayout::TwoDescriptors => vec![HEADER_LEN as u32, PAGE as u32],
            RxLayout::OneDescriptor(len) => vec![*len],
            RxLayout::Pieces(pieces) => pieces.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(shape: &Shape, total: usize) -> Vec<u32> {
        let mut out = Vec::new();
        shape.pieces(total, &mut out);
        out
    }

    #[test]
    fn shapes_cut_as_guest_kernels_do() {
        let full = HEADER_LEN + 65536;
        assert_eq!(pieces(&Shape::single(), full), [65580]);
        assert_eq!(pieces(&Shape::header_then_payload(), full), [44, 65536]);
        assert_eq!(
            pieces(&Shape::header_then_payload(), 44),
            [44],
            "no empty descriptor behind a bare header"
        );
        assert_eq!(pieces(&Shape::linux_6_12(), full), [44, 32768, 32768]);
        assert_eq!(pieces(&Shape::linux_6_12(), 44 + 100), [44, 100]);
        assert_eq!(pieces(&Shape::page_fragments(0), full).len(), 1 + 16);
        let zerocopy = pieces(&Shape::page_fragments(100), full);
        assert_eq!(zerocopy.len(), 1 + 17);
        assert_eq!((zerocopy[1], zerocopy[17]), (3996, 100));
        assert_eq!(pieces(&Shape::split_header(3), 50), [14, 14, 16, 6]);
        assert_eq!(pieces(&Shape::split_header(44), 45).len(), 45);
        assert_eq!(pieces(&Shape::cuts(&[10, 0, 30]), 60), [10, 0, 30, 20]);
        assert_eq!(pieces(&Shape::every(20), 50), [20, 20, 10]);
    }

    #[test]
    fn every_shape_keeps_every_byte() {
        for shape in [
            Shape::single(),
            Shape::linux_6_12(),
            Shape::page_fragments(7),
            Shape::split_header(5),
            Shape::every(33),
        ] {
            for total in [44, 45, 4096, 32812, 32813, 65580] {
                assert_eq!(
                    pieces(&shape, total).iter().sum::<u32>() as usize,
                    total,
                    "{shape:?}"
                );
            }
        }
    }
}
