//! The Helm charts, judged by Helm itself, by Kubernetes' own schemas, and by the binary that reads what they make.
//!
//! `UPDATE_CHARTS=1 cargo test --test charts` writes what is generated: the sidecar's schema into values.schema.json, and the values into
//! the README of the chart. `sh tests/kubernetes/tools.sh` installs the tools.

mod custom_resources;
mod library;
mod metadata;
mod pods;
mod policy;
mod readme;
mod rendered;
mod schema;
mod sidecar;
mod tools;
mod webhook;
mod wrong_values;
