//! What one of Linux's test programs says, read.
//!
//! A program writes `NUMBER - NAME...` when it begins a case, and `ok` or `skipped` behind it in the end. A case that fails
//! ends the program, which says why at that place. `tools/testing/vsock/util.c` in Linux, `run_tests`.

/// A case, as one of the two programs saw it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// Its place in the program.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// How it ended.
    pub end: End,
}

/// How a case ended for one of the two programs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// As it should. The program may have said something all the same.
    Ok(String),
    /// It was told to leave it out, or the other one was.
    Skipped,
    /// The program ended, or is still in it. What it said.
    NotOk(String),
}

/// The cases of a transcript, in order.
pub fn read(transcript: &str) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for line in transcript.lines() {
        if let Some((number, name, rest)) = begin(line) {
            lines.push(Line {
                number,
                name: name.to_owned(),
                end: End::NotOk(rest.to_owned()),
            });
        } else if line.starts_with("All tests have been executed") {
            break;
        } else if let Some(Line {
            end: End::NotOk(said),
            ..
        }) = lines.last_mut()
        {
            said.push('\n');
            said.push_str(line);
        }
    }
    for line in &mut lines {
        let End::NotOk(said) = &line.end else { continue };
        let said = said.trim();
        if said == "skipped" {
            line.end = End::Skipped;
        } else if let Some(said) = said.strip_suffix("ok") {
            line.end = End::Ok(said.trim().to_owned());
        } else {
            line.end = End::NotOk(said.to_owned());
        }
    }
    lines
}

/// Whether the program got through to its end, together with the other one.
pub fn is_whole(transcript: &str) -> bool {
    transcript.ends_with("Waiting other peer...ok\n")
}

fn begin(line: &str) -> Option<(u32, &str, &str)> {
    let (number, rest) = line.split_once(" - ")?;
    let (name, rest) = rest.split_once("...")?;
    Some((number.parse().ok()?, name, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_what_the_program_said_behind_the_name() {
        let transcript = "Control socket connected to 192.168.77.4:1234.\n\
                          0 - SOCK_STREAM connection reset...ok\n\
                          1 - SOCK_STREAM bind only...skipped\n\
                          2 - SOCK_STREAM client close...connect: Connection reset by peer\nmore\n";
        let line = |number, name: &str, end| Line {
            number,
            name: name.to_owned(),
            end,
        };
        assert_eq!(
            read(transcript),
            [
                line(0, "SOCK_STREAM connection reset", End::Ok(String::new())),
                line(1, "SOCK_STREAM bind only", End::Skipped),
                line(
                    2,
                    "SOCK_STREAM client close",
                    End::NotOk("connect: Connection reset by peer\nmore".to_owned())
                ),
            ]
        );
        assert!(!is_whole(transcript));
    }

    #[test]
    fn a_program_may_say_something_and_be_content() {
        let transcript = "0 - SIOCOUTQ...Test skipped, SIOCOUTQ not supported.\nok\n\
                          All tests have been executed. Waiting other peer...ok\n";
        let [line] = &read(transcript)[..] else { panic!() };
        assert_eq!(
            line.end,
            End::Ok("Test skipped, SIOCOUTQ not supported.".to_owned())
        );
        assert!(is_whole(transcript));
    }
}
