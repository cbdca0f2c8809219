//! The status page as people see it: a real admin server serves it, a real Chromium shows it.
//!
//! The browser is driven over a pipe ([`browser`]), and [`sidecar`] says what a sidecar in some state would say. Every test
//! ends by asking the browser whether anything went wrong that nobody saw ([`Tab::is_clean`](browser::Tab::is_clean)).

mod browser;
mod layout;
mod safety;
mod screenshots;
mod sidecar;
mod states;
