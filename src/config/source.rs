//! Reading the file: what is no text is refused before a parser sees it.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use sha2::{Digest, Sha256};

use super::diagnostic::{ConfigError, Report};
use super::document::Span;

/// Bytes that the file may have. A ConfigMap holds no more than 1 MiB either.
const MAX_BYTES: u64 = 1024 * 1024;

/// The text of a configuration that has not been looked at yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Text {
    /// What messages call it.
    pub(super) name: String,
    pub(super) text: String,
}

impl Text {
    /// Reads the file at `path` (`-` is standard input): at most 1 MiB of UTF-8. Blocks on the file.
    pub fn read(path: &Path) -> Result<Text, ConfigError> {
        read(path, |path| File::open(path).map_err(Unreadable::Io))
    }

    /// The same of a program that runs: it must not wait for what a pipe or a device may say one day, so only a file will do.
    pub fn read_again(path: &Path) -> Result<Text, ConfigError> {
        read(path, open_file)
    }

    /// What tells two texts apart: the SHA-256 of the bytes.
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.text).into()
    }
}

/// Why nothing can be read.
enum Unreadable {
    Io(io::Error),
    /// It is this, and no file.
    NoFile(&'static str),
}

/// Opens a file, and waits for nobody: a pipe would be open once somebody writes to it.
fn open_file(path: &Path) -> Result<File, Unreadable> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let opened = File::options().read(true).custom_flags(flags).open(path);
    let file = opened.map_err(Unreadable::Io)?;
    let kind = file.metadata().map_err(Unreadable::Io)?.file_type();
    let what = match () {
        // Reading a directory says so itself.
        () if kind.is_file() || kind.is_dir() => return Ok(file),
        () if kind.is_fifo() => "a pipe",
        () if kind.is_char_device() || kind.is_block_device() => "a device",
        () => "no regular file",
    };
    Err(Unreadable::NoFile(what))
}

/// Reads the file that `open` opens.
fn read(path: &Path, open: impl FnOnce(&Path) -> Result<File, Unreadable>) -> Result<Text, ConfigError> {
    let (name, bytes) = if path == Path::new("-") {
        let name = "<stdin>".to_owned();
        let bytes = read_bounded(io::stdin().lock()).map_err(|error| explain(&name, &error))?;
        (name, bytes)
    } else {
        let name = path.display().to_string();
        let read = open(path).and_then(|file| read_bounded(file).map_err(Unreadable::Io));
        let bytes = read.map_err(|unreadable| match unreadable {
            Unreadable::Io(error) => explain(&name, &error),
            Unreadable::NoFile(what) => ConfigError::of_file(
                &name,
                format!("this is {what}"),
                "put a file there; pipes are read at start only",
            ),
        })?;
        (name, bytes)
    };
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_BYTES) {
        return Err(ConfigError::of_file(
            &name,
            "the file is larger than 1 MiB".to_owned(),
            "name the configuration of vsock-sidecar; one of this size has many guests: split them over sidecars",
        ));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Text { name, text }),
        Err(error) => Err(not_utf8(&name, &error)),
    }
}

/// Refuses a file in which nothing is configured.
pub(super) fn refuse_empty(text: &str, name: &str) -> Result<(), ConfigError> {
    let says_nothing = |line: &str| {
        let line = line.trim();
        line.is_empty() || line.starts_with('#') || line == "---" || line == "..."
    };
    if !text.lines().all(says_nothing) {
        return Ok(());
    }
    let what = if text.trim().is_empty() {
        "the file is empty"
    } else {
        "the file holds nothing but comments"
    };
    Err(ConfigError::of_file(
        name,
        what.to_owned(),
        "at least one guest is needed: guests: [{name: web, cid: 3, vhostUser: {socket: /run/web.sock}}]",
    ))
}

fn read_bounded(source: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn explain(name: &str, error: &io::Error) -> ConfigError {
    let (what, help) = match error.kind() {
        io::ErrorKind::NotFound => ("there is no such file", "give the path of the configuration file"),
        io::ErrorKind::IsADirectory => (
            "this is a directory",
            "give the path of the file in it, such as DIRECTORY/config.yaml",
        ),
        io::ErrorKind::NotADirectory => ("a part of this path is no directory", "give the path of the file"),
        io::ErrorKind::PermissionDenied => (
            "the file may not be read by this user",
            "make it readable (in a pod: defaultMode, fsGroup, runAsUser)",
        ),
        _ => {
            return ConfigError::of_file(
                name,
                format!("cannot read the file: {error}"),
                "make the file readable",
            );
        }
    };
    ConfigError::of_file(name, what.to_owned(), help)
}

fn not_utf8(name: &str, error: &std::string::FromUtf8Error) -> ConfigError {
    let bytes = error.as_bytes();
    let valid = bytes.get(..error.utf8_error().valid_up_to()).unwrap_or_default();
    let text = String::from_utf8_lossy(valid);
    let line_start = text.rfind('\n').map_or(0, |at| at + 1);
    let small = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    let span = Span {
        line: small(text.matches('\n').count() + 1),
        column: small(text.get(line_start..).unwrap_or_default().chars().count() + 1),
        offset: None,
        length: 0,
    };
    let mut report = Report::new(name, "");
    let byte = bytes.get(valid.len()).copied().unwrap_or_default();
    report.error_at(
        span,
        String::new(),
        format!("the file is not UTF-8: byte 0x{byte:02x} has no place here"),
        "save the file as UTF-8 text",
    );
    match report.finish() {
        Err(error) => error,
        Ok(_) => ConfigError::of_file(
            name,
            "the file is not UTF-8".to_owned(),
            "save the file as UTF-8 text",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Root may read everything, so that a test over a real file would depend on who runs it.
    #[test]
    fn an_unreadable_file_is_explained() {
        let error = explain("config.yaml", &io::ErrorKind::PermissionDenied.into()).to_string();
        assert!(
            error.starts_with("error: config.yaml: the file may not be read by this user"),
            "{error}"
        );
        assert!(error.contains("fsGroup"), "{error}");
    }

    /// Opening a pipe waits for who writes to it, and nobody may.
    #[test]
    fn who_runs_waits_for_no_pipe() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("config.yaml");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, mode).unwrap();
        let said = |path: &Path| Text::read_again(path).unwrap_err().to_string();
        assert!(said(&pipe).contains("this is a pipe"), "{}", said(&pipe));
        assert!(said(Path::new("/dev/zero")).contains("this is a device"));
        assert!(said(dir.path()).contains("this is a directory"));
        let file = dir.path().join("file.yaml");
        std::fs::write(&file, "guests: []").unwrap();
        assert_eq!(Text::read_again(&file).unwrap(), Text::read(&file).unwrap());
    }

    #[test]
    fn the_place_of_a_foreign_byte_is_counted_in_characters() {
        let bytes = b"one\n\xc3\xa9t\xe9".to_vec();
        let error = String::from_utf8(bytes).expect_err("Latin 1");
        let diagnostic = not_utf8("f", &error).diagnostics.remove(0);
        assert_eq!(diagnostic.position, Some((2, 3)));
    }

    #[test]
    fn comments_and_markers_configure_nothing() {
        for text in ["", " \n", "# a\n", "---\n# a\n...\n"] {
            assert!(refuse_empty(text, "f").is_err(), "{text:?}");
        }
        assert!(refuse_empty("guests: []", "f").is_ok());
    }
}
