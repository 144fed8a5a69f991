//! Wake-ups within one shard: who waits, who is rung, nothing shared with other threads.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};

/// Tasks that wait for the same thing. A task that polls repeatedly is listed once, so the list is
/// bounded by the number of tasks.
#[derive(Default)]
pub(super) struct Waiters(Vec<Waker>);

impl Waiters {
    pub(super) fn add(&mut self, cx: &Context<'_>) {
        if !self.0.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.0.push(cx.waker().clone());
        }
    }

    pub(super) fn wake_all(&mut self) {
        self.0.drain(..).for_each(Waker::wake);
    }
}

/// The driver's doorbell: which connections a task has touched since the driver last looked.
///
/// Each connection is queued at most once (see `Shared::queued`), so the queue is bounded by the number
/// of connections.
#[derive(Default)]
pub(super) struct Bell {
    touched: RefCell<VecDeque<usize>>,
    rung: Cell<bool>,
    driver: Cell<Option<Waker>>,
}

impl Bell {
    /// Puts a connection on the driver's list and wakes the driver.
    pub(super) fn touch(&self, key: usize) {
        self.touched.borrow_mut().push_back(key);
        self.ring();
    }

    /// Wakes the driver.
    pub(super) fn ring(&self) {
        if !self.rung.replace(true)
            && let Some(waker) = self.driver.take()
        {
            waker.wake();
        }
    }

    /// The next connection to look after.
    pub(super) fn next(&self) -> Option<usize> {
        self.touched.borrow_mut().pop_front()
    }

    /// How many connections are waiting for the driver.
    pub(super) fn len(&self) -> usize {
        self.touched.borrow().len()
    }

    /// Ready once when the bell was rung since the last time.
    pub(super) fn poll_rung(&self, cx: &Context<'_>) -> Poll<()> {
        if self.rung.replace(false) {
            return Poll::Ready(());
        }
        self.driver.set(Some(cx.waker().clone()));
        Poll::Pending
    }
}
