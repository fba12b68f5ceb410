//! The built-in demo: a small model that recalls facts from its context, two documents, two cartridges.
