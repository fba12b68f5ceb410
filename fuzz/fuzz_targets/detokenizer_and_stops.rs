#![no_main]
cartouche_fuzz::driver!();
