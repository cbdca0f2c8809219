//! The admission webhook: recorded requests, pods of unusual shapes, and the program itself over TLS.
//!
//! `tests/webhook/requests/*.json` are AdmissionReviews as API servers send them, `tests/webhook/golden/*.json` the pods that
//! are to come of them. After a change that is meant, `UPDATE_SNAPSHOTS=1 cargo test --test webhook` writes these anew; read the
//! difference before you keep it, and hold the chart against it.

mod golden;
mod inject;
mod pods;
mod serving;
mod support;
