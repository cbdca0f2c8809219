//! The server's certificate and key, from two files that change.
//!
//! cert-manager and the kubelet renew a Secret's volume by replacing the symbolic link `..data`, which both files lead through.
//! So their contents are looked at from time to time, and nothing depends on what a file system tells of links. Connections that
//! are open keep what they began with; new ones get the new certificate.
//!
//! A pair that cannot be used (half written, a key of another certificate, expired, not valid yet) changes nothing: the one before goes
//! on, a counter and one line in the log say so. One that is early is taken when its time has come.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use sha2::{Digest, Sha256};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{self, ServerConfig};

use super::der;

/// Most bytes of either file.
const MAX_FILE: u64 = 1 << 20;

/// Why a certificate and its key cannot be used. Says which file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", file.display())]
    Unreadable {
        /// Which.
        file: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// A file that is far too long.
    #[error("{} has more than {MAX_FILE} bytes and is no certificate or key", file.display())]
    TooLong {
        /// Which.
        file: PathBuf,
    },
    /// No certificates in it.
    #[error("{} is no chain of certificates in PEM form, the server's own first: {problem}", file.display())]
    BadCertificate {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// No key in it.
    #[error("{} is no private key in PEM form (PKCS #8, PKCS #1 or SEC 1): {problem}", file.display())]
    BadKey {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// They do not belong together.
    #[error("the key in {} is not that of the certificate in {}: {problem}", key.display(), certificate.display())]
    Mismatch {
        /// The file with the certificate.
        certificate: PathBuf,
        /// The file with the key.
        key: PathBuf,
        /// In rustls' words.
        problem: String,
    },
    /// Its time is over.
    #[error("the certificate in {} has expired", file.display())]
    Expired {
        /// Which.
        file: PathBuf,
    },
    /// Its time has not come.
    #[error(
        "the certificate in {} is valid in {seconds} s only, and is taken then; if it was made just now, one of the two clocks is wrong",
        file.display()
    )]
    Early {
        /// Which.
        file: PathBuf,
        /// How long to wait.
        seconds: i64,
    },
}

/// Where certificate and key are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Files {
    /// The chain, in PEM form.
    pub certificate: PathBuf,
    /// The key, in PEM form.
    pub key: PathBuf,
}

/// A certificate with its key, checked to belong together.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    key: Arc<CertifiedKey>,
    /// Unix time in seconds.
    not_before: i64,
    /// Unix time in seconds.
    not_after: i64,
}

/// What is in the two files.
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Contents {
    /// Reads both, of one version: a volume may be replaced between the two.
    fn read(files: &Files) -> Result<Contents, CertificateError> {
        const TRIES: usize = 3;
        let mut certificate = read(&files.certificate)?;
        for _ in 1..TRIES {
            let key = read(&files.key)?;
            let again = read(&files.certificate)?;
            if again == certificate {
                return Ok(Contents { certificate, key });
            }
            certificate = again;
        }
        // It changes faster than it can be read; if the two do not fit, that is said, and the next look finds others.
        Ok(Contents {
            certificate,
            key: read(&files.key)?,
        })
    }

    fn digest(&self) -> [u8; 32] {
        let parts = [&self.certificate, &self.key].map(Sha256::digest);
        Sha256::digest(parts.concat()).into()
    }

    fn pair(self, files: &Files) -> Result<Pair, CertificateError> {
        let bad_certificate = |problem: String| CertificateError::BadCertificate {
            file: files.certificate.clone(),
            problem,
        };
        let bad_key = |problem: String| CertificateError::BadKey {
            file: files.key.clone(),
            problem,
        };
        let chain = CertificateDer::pem_slice_iter(&self.certificate)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| bad_certificate(error.to_string()))?;
        let own = chain
            .first()
            .ok_or_else(|| bad_certificate("it has none".to_owned()))?;
        let (not_before, not_after) = der::validity(own)
            .ok_or_else(|| bad_certificate("the first is no X.509 certificate".to_owned()))?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| bad_key(error.to_string()))?;
        let key = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => CertificateError::Mismatch {
                certificate: files.certificate.clone(),
                key: files.key.clone(),
                problem: error.to_string(),
            },
            error => bad_key(error.to_string()),
        })?;
        Ok(Pair {
            key: Arc::new(key),
            not_before,
            not_after,
        })
    }
}

fn read(file: &Path) -> Result<Vec<u8>, CertificateError> {
    let unreadable = |source| CertificateError::Unreadable {
        file: file.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let opened = fs::File::open(file).map_err(unreadable)?;
    opened
        .take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    match bytes.len() as u64 > MAX_FILE {
        true => Err(CertificateError::TooLong {
            file: file.to_owned(),
        }),
        false => Ok(bytes),
    }
}

/// What a look at the files has found.
#[derive(Debug)]
pub(super) enum Look {
    /// The same as before.
    Same,
    /// A new certificate, which is served from now on, until this Unix time.
    New {
        /// In seconds.
        not_after: i64,
    },
    /// Something that cannot be used. Told of once, however long it stays.
    Bad(CertificateError),
}

/// Looks at the files, and has what is served.
pub(super) struct Keeper {
    files: Files,
    served: Arc<Served>,
    /// The contents that were last looked at, bad ones included. `None` if they could not be read, or are to be looked at again.
    seen: Option<[u8; 32]>,
    /// Contents that were told of as being early.
    early: Option<[u8; 32]>,
}

impl Keeper {
    /// Reads the first pair. Its end is returned, and may be over: who starts with an expired certificate waits for the next.
    pub(super) fn new(files: Files) -> Result<(Keeper, i64), CertificateError> {
        let contents = Contents::read(&files)?;
        let seen = Some(contents.digest());
        let pair = contents.pair(&files)?;
        let not_after = pair.not_after;
        let served = Arc::new(Served(RwLock::new(pair.key)));
        let keeper = Keeper {
            files,
            served,
            seen,
            early: None,
        };
        Ok((keeper, not_after))
    }

    /// The TLS side of it: HTTP/1.1 only, TLS 1.2 for API servers whose crypto is certified for no later one.
    ///
    /// # Errors
    /// If rustls does not want these versions with its own provider, which a test would have said.
    pub(super) fn tls(&self) -> Result<Arc<ServerConfig>, rustls::Error> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(self.served.clone());
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // No session is resumed: one would outlive its certificate, and API servers ask for none.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// Looks whether there is something new. `now` in Unix time.
    pub(super) fn look(&mut self, now: i64) -> Look {
        let contents = match Contents::read(&self.files) {
            Ok(contents) => contents,
            Err(error) => {
                return match self.seen.take() {
                    Some(_) => Look::Bad(error),
                    None => Look::Same,
                };
            }
        };
        let digest = contents.digest();
        if self.seen.replace(digest) == Some(digest) {
            return Look::Same;
        }
        match contents.pair(&self.files) {
            Ok(pair) if pair.not_after <= now => Look::Bad(CertificateError::Expired {
                file: self.files.certificate.clone(),
            }),
            Ok(pair) if pair.not_before > now => {
                self.seen = None;
                match self.early.replace(digest) == Some(digest) {
                    true => Look::Same,
                    false => Look::Bad(CertificateError::Early {
                        file: self.files.certificate.clone(),
                        seconds: pair.not_before.saturating_sub(now),
                    }),
                }
            }
            Ok(pair) => {
                *self.served.0.write().unwrap_or_else(PoisonError::into_inner) = pair.key;
                Look::New {
                    not_after: pair.not_after,
                }
            }
            Err(error) => Look::Bad(error),
        }
    }
}

/// What a handshake takes.
#[derive(Debug)]
struct Served(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Served {
    /// Whatever name the client asks for: the API server asks for the Service's, and judges by itself.
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const NOW: i64 = 1_800_000_000;

    /// A certificate until the beginning of `year`, and its key.
    fn pair(year: i32) -> (String, String) {
        pair_from(2020, year)
    }

    fn pair_from(begin: i32, year: i32) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["webhook.test".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(begin, 1, 1);
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    /// A volume as the kubelet makes them: the files are links through `..data`, which is a link to a directory.
    struct Volume(tempfile::TempDir, u32);

    impl Volume {
        fn new((certificate, key): &(String, String)) -> Volume {
            let mut volume = Volume(tempfile::tempdir().unwrap(), 0);
            volume.swap(certificate, key);
            for file in ["tls.crt", "tls.key"] {
                symlink(Path::new("..data").join(file), volume.0.path().join(file)).unwrap();
            }
            volume
        }

        fn swap(&mut self, certificate: &str, key: &str) {
            self.1 += 1;
            let name = format!("..version-{}", self.1);
            let directory = self.0.path().join(&name);
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("tls.crt"), certificate).unwrap();
            fs::write(directory.join("tls.key"), key).unwrap();
            let link = self.0.path().join("..data_tmp");
            symlink(&name, &link).unwrap();
            fs::rename(&link, self.0.path().join("..data")).unwrap();
        }

        fn files(&self) -> Files {
            Files {
                certificate: self.0.path().join("tls.crt"),
                key: self.0.path().join("tls.key"),
            }
        }
    }

    fn served(keeper: &Keeper) -> Vec<u8> {
        keeper.served.0.read().unwrap().cert[0].to_vec()
    }

    #[test]
    fn a_swapped_volume_is_noticed_and_an_unchanged_one_is_not() {
        let (old, new) = (pair(2050), pair(2060));
        let mut volume = Volume::new(&old);
        let (mut keeper, not_after) = Keeper::new(volume.files()).unwrap();
        assert_eq!(not_after, 2_524_608_000);
        let first = served(&keeper);
        assert!(matches!(keeper.look(NOW), Look::Same));
        volume.swap(&new.0, &new.1);
        assert!(matches!(
            keeper.look(NOW),
            Look::New {
                not_after: 2_840_140_800
            }
        ));
        assert_ne!(served(&keeper), first);
        assert!(matches!(keeper.look(NOW), Look::Same));
    }

    #[test]
    fn a_bad_pair_is_told_of_once_and_the_good_one_stays() {
        let (old, new, expired) = (pair(2050), pair(2060), pair(2020));
        let broken = old.0.replace('M', "-");
        let bad: [(&str, &str, &str); 6] = [
            (&new.0, &old.1, "is not that of the certificate"),
            (&old.0, &new.1, "is not that of the certificate"),
            (&broken, &old.1, "no chain of certificates"),
            ("", &old.1, "no chain of certificates"),
            (&old.0, "nonsense", "no private key"),
            (&expired.0, &expired.1, "has expired"),
        ];
        let mut volume = Volume::new(&old);
        let (mut keeper, _) = Keeper::new(volume.files()).unwrap();
        let first = served(&keeper);
        for (certificate, key, word) in bad {
            volume.swap(certificate, key);
            match keeper.look(NOW) {
                Look::Bad(error) => assert!(error.to_string().contains(word), "{error}"),
                other => panic!("{word}: {other:?}"),
            }
            assert!(matches!(keeper.look(NOW), Look::Same), "{word}");
            assert_eq!(served(&keeper), first, "{word}");
        }
        volume.swap(&new.0, &new.1);
        assert!(matches!(keeper.look(NOW), Look::New { .. }));
    }

    /// No API server would take it before; the one before is good for as long.
    #[test]
    fn a_certificate_of_tomorrow_is_taken_tomorrow() {
        let (old, new) = (pair(2050), pair_from(2040, 2060));
        let in_2040 = 2_208_988_800;
        let mut volume = Volume::new(&old);
        let (mut keeper, _) = Keeper::new(volume.files()).unwrap();
        let first = served(&keeper);
        volume.swap(&new.0, &new.1);
        match keeper.look(in_2040 - 60) {
            Look::Bad(error) => assert!(error.to_string().contains("in 60 s"), "{error}"),
            other => panic!("{other:?}"),
        }
        assert!(matches!(keeper.look(in_2040 - 50), Look::Same));
        assert_eq!(served(&keeper), first);
        assert!(matches!(keeper.look(in_2040), Look::New { .. }));
        assert_ne!(served(&keeper), first);
        assert!(matches!(keeper.look(in_2040), Look::Same));
    }

    #[test]
    fn files_that_are_gone_are_told_of_once_and_found_again() {
        let volume = Volume::new(&pair(2050));
        let (mut keeper, _) = Keeper::new(volume.files()).unwrap();
        let (data, aside) = (volume.0.path().join("..data"), volume.0.path().join("aside"));
        fs::rename(&data, &aside).unwrap();
        assert!(matches!(
            keeper.look(NOW),
            Look::Bad(CertificateError::Unreadable { .. })
        ));
        assert!(matches!(keeper.look(NOW), Look::Same));
        fs::rename(&aside, &data).unwrap();
        assert!(matches!(keeper.look(NOW), Look::New { .. }));
    }

    #[test]
    fn there_is_no_start_without_a_pair_but_with_an_expired_one() {
        let missing = Files {
            certificate: "/nonexistent/tls.crt".into(),
            key: "/nonexistent/tls.key".into(),
        };
        let error = Keeper::new(missing).err().unwrap().to_string();
        assert!(error.contains("/nonexistent/tls.crt"), "{error}");
        let volume = Volume::new(&pair(2020));
        let (_, not_after) = Keeper::new(volume.files()).unwrap();
        assert!(not_after < NOW);
    }
}
