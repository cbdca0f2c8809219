//! Prometheus is the judge: its linter reads a fully populated page, and a real server scrapes the admin port.

#[path = "prometheus/families.rs"]
mod families;
#[path = "prometheus/page.rs"]
mod page;
#[path = "prometheus/scrape.rs"]
mod scrape;

/// A program that the test needs is not installed: a failure in CI, which installs it, and a remark elsewhere.
fn missing(program: &str, package: &str, error: &std::io::Error) {
    let advice = format!("cannot run {program}: {error}; install it with: apt-get install {package}");
    assert!(std::env::var_os("CI").is_none(), "{advice}");
    eprintln!("NOT TESTED: {advice}");
}
