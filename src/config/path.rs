//! Paths of unix sockets and directories.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Deserializer;
use serde::{Deserialize, Serialize, Serializer};

use super::diagnostic::quoted;
use super::given::Refusal;
use super::values::{Text, scalar_schema, text_serde};

text_serde!(SocketPath);

/// The absolute path of a unix socket.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SocketPath(pub(super) String);

impl SocketPath {
    /// `sun_path` of unix(7) has 108 bytes, the last of which is the NUL.
    pub(super) const MAX_LENGTH: usize = 107;
}

impl Text for SocketPath {
    const EXPECTED: &'static str = "the absolute path of a unix socket, such as /run/vsock-sidecar/web.sock";

    fn parse(text: &str) -> Result<SocketPath, Refusal> {
        if let Some(path) = text.strip_prefix("unix://") {
            return Err(Refusal::new(
                "a plain path belongs here, without `unix://`",
                format!("write {path}"),
            ));
        }
        check_path(text)?;
        check_no_braces(text)?;
        check_path_length(text, text.len())?;
        Ok(SocketPath(text.to_owned()))
    }
}

impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

scalar_schema!(
    SocketPath,
    json_schema!({"type": "string", "pattern": "^/[^{}]*[^/{}]$", "maxLength": 107})
);

text_serde!(Directory);

/// The absolute path of a directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Directory(pub(super) String);

impl Text for Directory {
    const EXPECTED: &'static str = "the absolute path of a directory, such as /run/vm";

    fn parse(text: &str) -> Result<Directory, Refusal> {
        if !text.starts_with('/') {
            return Err(Refusal::new(
                format!("{} is no absolute path", quoted(text)),
                "give the absolute path of a directory, such as /run/vm",
            ));
        }
        if text.contains(|c: char| c.is_control()) {
            return Err(Refusal::new("the path holds a control character", "remove it"));
        }
        Ok(Directory(text.to_owned()))
    }
}

impl fmt::Display for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

scalar_schema!(Directory, json_schema!({"type": "string", "pattern": "^/"}));

/// Refuses what can be no path of a unix socket whatever its length.
pub(super) fn check_path(path: &str) -> Result<(), Refusal> {
    if path.is_empty() {
        return Err(Refusal::new(
            "the path of the socket is missing",
            "give an absolute path, such as /run/web.sock",
        ));
    }
    if !path.starts_with('/') {
        return Err(Refusal::new(
            format!("{} is a relative path", quoted(path)),
            format!(
                "give an absolute path, such as /run/{}",
                path.trim_start_matches("./")
            ),
        ));
    }
    if path.ends_with('/') || path.ends_with("/.") || path.ends_with("/..") {
        return Err(Refusal::new(
            format!("{} is the path of a directory", quoted(path)),
            "add the name of the socket in it",
        ));
    }
    if path.contains(|c: char| c.is_control()) {
        return Err(Refusal::new("the path holds a control character", "remove it"));
    }
    Ok(())
}

/// Refuses what looks like a placeholder where none is filled in.
pub(super) fn check_no_braces(path: &str) -> Result<(), Refusal> {
    if !path.contains(['{', '}']) {
        return Ok(());
    }
    Err(Refusal::new(
        format!("{} has braces, but nothing is filled in here", quoted(path)),
        "write the path out: only the unix:// targets of outbound rules have {port} and {cid}",
    ))
}

/// Refuses a path that, filled in, has more bytes than a socket address holds.
pub(super) fn check_path_length(path: &str, filled_in: usize) -> Result<(), Refusal> {
    if filled_in <= SocketPath::MAX_LENGTH {
        return Ok(());
    }
    Err(Refusal::new(
        format!(
            "{} has {filled_in} bytes; a socket address (sun_path) holds {}",
            quoted(path),
            SocketPath::MAX_LENGTH
        ),
        "give a shorter path",
    ))
}
