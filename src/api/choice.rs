//! One choice of a reply that is sent whole, as it comes together.

use super::{error::ApiError, generate::Finish};

/// What has come of a choice so far; `T` is what is kept of its tokens.
pub struct Choice<T> {
    pub text: String,
    pub tokens: Vec<T>,
    finish: Option<Finish>,
}

impl<T> Choice<T> {
    /// As many as that, with nothing in them.
    pub fn empty(count: usize) -> Vec<Self> {
        let empty = || Self { text: String::new(), tokens: Vec::new(), finish: None };
        std::iter::repeat_with(empty).take(count).collect()
    }

    pub fn push(&mut self, text: &str, token: Option<T>, finish: Option<Finish>) {
        self.text.push_str(text);
        self.tokens.extend(token);
        self.finish = finish.or(self.finish.take());
    }

    /// Why it ended, which must have happened.
    pub fn finish(&mut self) -> Result<Finish, ApiError> {
        let early = || ApiError::internal("the engine ended the request before it was complete");
        self.finish.take().ok_or_else(early)
    }
}
