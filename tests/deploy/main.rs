//! What is deployed: image, manifests, dashboards and alert rules, each held against the program and against the tools that will read it.
//!
//! The tools are installed by `sh tests/kubernetes/image-tools.sh`; `kubernetes-validate` by `sh tests/kubernetes/tools.sh`.

mod alerts;
mod built;
mod dashboards;
mod expressions;
mod host;
mod image;
mod live;
mod manifests;
mod sidecar;
#[path = "../e2e/support/mod.rs"]
#[allow(dead_code, unused_imports)]
mod support;
mod tools;
