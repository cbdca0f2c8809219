//! The admission webhook.

pub mod container;
mod inject;
mod patch;
mod refusal;
mod settings;

pub use inject::{Outcome, inject};
pub use patch::{DoesNotFit, Patched};
pub use refusal::Refusal;
pub use settings::{PullPolicy, Settings, SettingsError};
