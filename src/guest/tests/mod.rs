//! The rings against a driver in the same process.

mod driver;
mod hostile;
mod notify;
mod oracle;
mod properties;
mod rx;
mod translated;
mod tx;
