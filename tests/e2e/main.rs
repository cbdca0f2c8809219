//! The whole binary, judged from both of its ends: an embedded guest on its vhost-user socket, real sockets at its
//! targets and listeners, its metrics and log in between. No virtual machine, no privileges.

mod support;

mod bad_start;
mod busy_poll;
mod capture;
mod confinement;
mod containment;
mod edges;
mod hostile_guest;
mod iommu;
mod iommu_hostile;
mod limits;
mod observability;
mod proxy_header;
mod reconnect;
mod reload;
mod seqpacket;
mod shutdown;
mod sibling_close;
mod siblings;
mod stream;
mod waiting;
