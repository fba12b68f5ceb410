//! Rules of the scheduler, one by one. What holds for all of them together is in `simulator.rs`.
