//! The guest against an independent device: proven before it judges ours.

mod back_end;
mod bulk;
mod device;
mod driver;
mod host;
mod iommu;
mod seqpacket;
mod sockets;
