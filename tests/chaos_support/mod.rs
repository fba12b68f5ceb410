//! What the chaos test is made of: a raw HTTP client whose every move can go wrong, the requests it sends and
//! what their answers must be.

pub mod client;
pub mod requests;
