//! Lends cartridges to requests.
