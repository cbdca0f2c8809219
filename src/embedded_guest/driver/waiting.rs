//! Sleeping until the device says something on either ring: what a single thread needs that both sends and receives.

use std::os::fd::AsFd;
use std::time::Instant;

use super::Driver;
use crate::embedded_guest::error::Result;
use crate::embedded_guest::fd::wait_readable;

impl Driver {
    /// Sleeps until a packet has come or, with `tx`, until the device has taken one; at most until `deadline`. Interrupts
    /// are on only meanwhile. Answers whether there is anything.
    pub fn wait_any(&mut self, tx: bool, deadline: Instant) -> Result<bool> {
        let mut ready = self.rx.enable_interrupts();
        if tx {
            ready |= self.tx.enable_interrupts();
        }
        while !ready {
            let woken = {
                let (rx_call, tx_call) = (self.rx.call().as_fd(), self.tx.call().as_fd());
                match tx {
                    true => wait_readable(&[rx_call, tx_call], Some(deadline))?,
                    false => wait_readable(&[rx_call], Some(deadline))?,
                }
            };
            if !woken {
                break;
            }
            self.rx.take_interrupts();
            ready = self.rx.has_used();
            if tx {
                self.tx.take_interrupts();
                ready |= self.tx.has_used();
            }
        }
        self.rx.disable_interrupts();
        if tx {
            self.tx.disable_interrupts();
            self.reclaim_tx();
        }
        Ok(ready)
    }
}
