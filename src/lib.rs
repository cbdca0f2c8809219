//! vsock-sidecar connects virtual machines to TCP services through virtio-vsock, from a container beside the VM.
//!
//! It is a vhost-user vsock backend: the VMM (QEMU, Cloud Hypervisor, crosvm, libkrun) connects to a unix socket and
//! shares guest memory; applications in the guest use plain AF_VSOCK; a YAML file says which guest ports reach which
//! services and which listeners reach which guest ports. What was negotiated and what flows is exported.
//!
//! # The house
//!
//! ```text
//!            main: parse, load, run, drain                    demo ── embedded_guest
//!                        │                                      │
//!                       app ────────────────────────────────────┘
//!      ┌───────────┬─────┴──────┬──────────────┬────────────┐
//!   config      vhost_user    device         admin        metrics, drain, logging
//!                  │   └───────▶│ (commands)
//!                  │      ┌─────┼───────┐
//!                  ▼      ▼     ▼       ▼
//!                 guest ◀─┘   vsock    host
//!                   └─────────▶ header   │
//!                   └────▶  sys  ◀───────┘
//! ```
//!
//! - [`vsock`] is the law: what packets mean. It performs no I/O and reads no clock.
//! - [`guest`] reads and writes guest memory and rings; [`host`] reads and writes sockets; neither knows the other.
//! - [`device`] is one thread a guest that owns all three and turns the crank.
//! - [`vhost_user`] talks to the VMM and hands the device owned things: a ring to run, a memory map.
//! - [`quota`] is what all guests share of the process: connections, memory, descriptors.
//! - [`sys`] holds the few system calls that need `unsafe`.
//! - [`confine`] gives up, once and for good, what the process does not need.
//! - [`capture`] writes packets down as a file that Wireshark reads, while it is being read.
//! - [`kubevirt`] gives a domain that KubeVirt describes our device.
//! - [`state`] is a client: it reads a running sidecar's `/state` and prints it for people; [`probe`] asks with it for the kubelet.
//! - [`webhook`] is a program of its own: it puts the sidecar into pods, for the Kubernetes API server.
//! - [`embedded_guest`] is the other side, a VMM and a driver without a VM, for tests, benches and the demo.
//!
//! `tests/architecture.rs` holds the source to these arrows.
//!
//! # Words
//!
//! Ring words are the driver's, because the standard fixed them: `rx` is the ring that brings packets *to* the guest, `tx`
//! the one that brings them from it. Endpoint words are ours: we *send* to the guest and *receive* from it. Metrics say
//! `guest_to_host` and `host_to_guest`.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod admin;
pub mod app;
pub mod capture;
pub mod config;
pub mod confine;
pub mod demo;
pub mod device;
pub mod drain;
pub mod embedded_guest;
pub mod guest;
pub mod host;
pub mod kubevirt;
pub mod logging;
pub mod metrics;
pub mod probe;
pub mod quota;
pub mod state;
pub mod sys;
pub mod terminal;
pub mod vhost_user;
pub mod vsock;
pub mod webhook;
