//! The archive format of initramfs: cpio `newc`, Linux's Documentation/driver-api/early-userspace/buffer-format.rst.

use super::VmError;

/// An archive under construction. The kernel unpacks several archives one behind the other, so parts can be concatenated.
#[derive(Default, Debug)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

impl Archive {
    /// Adds a directory, named without a leading slash.
    pub fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY | 0o755, 0, &[]);
    }

    /// Adds a regular file, named without a leading slash; its directory must have been added before. Fails for 4 GiB and more.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), VmError> {
        let size = u32::try_from(content.len()).map_err(|_| VmError::TooLarge {
            name: name.to_owned(),
            size: content.len(),
        })?;
        self.entry(name, REGULAR | mode, size, content);
        Ok(())
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, size: u32, content: &[u8]) {
        self.entries += 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, device and rdevice major and minor, namesize with its NUL, check.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    /// Name and content both end on a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.file("init", 0o755, b"12345").unwrap();
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8(bytes).unwrap();
        // Each header has 110 bytes; "dev" and its NUL end on 114, padded to 116.
        assert!(text.starts_with("07070100000001000041ed"), "{text}");
        assert!(text[116..].starts_with("07070100000002000081ed"), "{text}");
        assert_eq!(&text[116 + 54..116 + 62], "00000005", "the file's size");
        assert_eq!(text.matches("070701").count(), 3);
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
    }
}
