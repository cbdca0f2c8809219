//! What the device's poll tells apart.

use mio::Token;

/// The waker of [`super::DeviceHandle`].
pub(super) const WAKE: Token = Token(0);

const FIRST_KICK: usize = 1;
const FIRST_SOCKET: usize = 16;

/// A meaning of a token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Source {
    /// Commands wait.
    Wake,
    /// The guest kicked this queue.
    Kick(usize),
    /// The socket of the flow at this slot.
    Flow(usize),
    /// The lingering socket at this index.
    Lingering(usize),
}

/// The token of a queue's kick.
pub(super) fn kick(queue: usize) -> Token {
    Token(FIRST_KICK + queue)
}

/// The token number of the flow at `slot`.
pub(super) fn flow(slot: usize) -> usize {
    FIRST_SOCKET + 2 * slot
}

/// The token number of a lingering socket.
pub(super) fn lingering(index: usize) -> usize {
    FIRST_SOCKET + 2 * index + 1
}

/// What a token stands for.
pub(super) fn source(token: Token) -> Source {
    match token.0 {
        0 => Source::Wake,
        n if n < FIRST_SOCKET => Source::Kick(n - FIRST_KICK),
        n if (n - FIRST_SOCKET).is_multiple_of(2) => Source::Flow((n - FIRST_SOCKET) / 2),
        n => Source::Lingering((n - FIRST_SOCKET) / 2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_keep_their_meaning() {
        assert_eq!(source(WAKE), Source::Wake);
        assert_eq!(source(kick(2)), Source::Kick(2));
        for n in [0, 1, 7, 100_000] {
            assert_eq!(source(Token(flow(n))), Source::Flow(n));
            assert_eq!(source(Token(lingering(n))), Source::Lingering(n));
        }
    }
}
