//! Panics that cost the work in which they happen, and not the thread or the process.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::Once;

/// What a piece of work panicked with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Panic {
    /// The text, if it has one.
    pub message: String,
    /// File, line and column; `None` where a panic was resumed, or the hook is another one.
    pub place: Option<String>,
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Some(place) => write!(f, "panicked at {place}: {}", self.message),
            None => write!(f, "panicked: {}", self.message),
        }
    }
}

/// The text of a panic's payload.
pub fn text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no text")
}

thread_local! {
    /// How deep in [`contain`] this thread is.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// Where the last contained panic of this thread was.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Does `work`; a panic in it ends it and is returned. What `work` has changed may be half changed then: the caller throws
/// it away, or takes from it only what cannot be.
///
/// Says nothing on stderr: how often somebody outside of this process can bring it about is for the caller to know, who
/// logs it in the program's own format. Panics elsewhere are reported as before.
pub fn contain<R>(work: impl FnOnce() -> R) -> Result<R, Panic> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !note_place(info) {
                before(info);
            }
        }));
    });
    DEPTH.set(DEPTH.get() + 1);
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    DEPTH.set(DEPTH.get() - 1);
    outcome.map_err(|payload| {
        let panic = Panic {
            message: text(payload.as_ref()).to_owned(),
            place: PLACE.take(),
        };
        // Dropping what somebody panicked with may panic as well: it is some integer or text, or something very odd.
        if let Err(odd) = panic::catch_unwind(AssertUnwindSafe(move || drop(payload))) {
            std::mem::forget(odd);
        }
        panic
    })
}

/// Keeps the place of a panic that is going to be contained; whether it is.
fn note_place(info: &PanicHookInfo<'_>) -> bool {
    // A thread that is being torn down is none of ours.
    if DEPTH.try_with(Cell::get).unwrap_or(0) == 0 {
        return false;
    }
    let place = info.location().map(ToString::to_string);
    let _ = PLACE.try_with(|kept| kept.replace(place));
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contained_panic_says_what_and_where() {
        let panic = contain(|| -> () { panic!("no {}", "luck") }).unwrap_err();
        assert_eq!(panic.message, "no luck");
        let place = panic.place.clone().unwrap();
        assert!(place.contains("src/sys/unwind.rs:"), "{place}");
        assert_eq!(panic.to_string(), format!("panicked at {place}: no luck"));
        assert_eq!(contain(|| 7), Ok(7), "the thread goes on");
    }

    #[test]
    fn a_panic_without_a_text_has_no_text() {
        let panic = contain(|| -> () { panic::resume_unwind(Box::new(7)) }).unwrap_err();
        assert_eq!(panic.to_string(), "panicked: no text");
    }

    /// What is thrown may itself be a trap.
    #[test]
    fn a_payload_that_panics_when_it_is_dropped_is_contained_too() {
        struct Trap;
        impl Drop for Trap {
            fn drop(&mut self) {
                panic!("dropped");
            }
        }
        assert!(contain(|| -> () { panic::panic_any(Trap) }).is_err());
        assert_eq!(contain(|| 7), Ok(7));
    }

    #[test]
    fn the_inner_of_two_takes_the_panic() {
        let outer = contain(|| {
            let inner = contain(|| -> () { panic!("inner") });
            assert_eq!(inner.unwrap_err().message, "inner");
            panic!("outer");
        });
        let outer: Result<(), Panic> = outer;
        assert_eq!(outer.unwrap_err().message, "outer");
    }
}
