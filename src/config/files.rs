//! What the file system has to say about a configuration: the directories in which sockets are to appear.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use super::diagnostic::{Report, quoted};
use super::document::{Document, NodeId};

/// A unix socket that the configuration makes the program bind, or connect to for its VMM.
pub(super) struct Socket {
    pub(super) path: PathBuf,
    pub(super) at: NodeId,
}

/// Reports directories that are missing, and sockets that are one and the same under two names.
pub(super) fn check(sockets: &[Socket], document: &Document, report: &mut Report<'_>) {
    let mut seen: HashMap<(PathBuf, OsString), &Socket> = HashMap::new();
    for socket in sockets {
        let (Some(directory), Some(file)) = (socket.path.parent(), socket.path.file_name()) else {
            continue;
        };
        match real_directory(directory) {
            Ok(real) => {
                let first = *seen.entry((real, file.to_owned())).or_insert(socket);
                // Equal paths are reported by `resolve` already.
                if first.path != socket.path {
                    let message = format!(
                        "this is the same socket as {} on line {}, by way of a symbolic link",
                        quoted(&first.path.display().to_string()),
                        document.line(first.at),
                    );
                    report.error(document, socket.at, message, "give each socket a path of its own");
                }
            }
            Err(reason) => report.error(
                document,
                socket.at,
                format!(
                    "the directory {} {reason}",
                    quoted(&directory.display().to_string())
                ),
                "create it, or mount a volume there",
            ),
        }
    }
}

fn real_directory(directory: &Path) -> Result<PathBuf, String> {
    let real = directory.canonicalize().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => "does not exist".to_owned(),
        _ => format!("cannot be used: {error}"),
    })?;
    if real.is_dir() {
        Ok(real)
    } else {
        Err("is no directory".to_owned())
    }
}
