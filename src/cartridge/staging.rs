//! Staging: from an announced cartridge to a resident one. It is checked against the model and has
//! its room before any number of it is read.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use super::{
    Cartridge, CartridgeError, Generation, Intake, Keep, Outline, Registry, RegistryOptions,
    provenance_warnings, validate::check_shape,
};
use crate::limits;

/// The room for a cartridge that is being read.
pub(super) enum Room<'a> {
    Reserved(Reserved<'a>),
    /// There was none.
    Refused(CartridgeError),
}

/// What an [`Intake`] was granted; it is there once the intake began.
type Granted<'a> = Rc<RefCell<Option<Room<'a>>>>;

impl Registry {
    /// Of no larger file anything is read. Numbers take at most four bytes each in a file, however
    /// they are kept.
    pub(super) fn max_file_bytes(&self) -> u64 {
        let RegistryOptions { byte_budget, dtype, max_file_bytes, .. } = &self.options;
        let numbers = byte_budget / dtype.size_in_bytes() as u64;
        let limit = numbers.saturating_mul(4).saturating_add(limits::CARTRIDGE_FILE_SLACK_BYTES);
        limit.min(*max_file_bytes)
    }

    /// An intake that admits what fits the model and has room, and the room it took.
    pub(super) fn intake(&self, max_bytes: u64) -> (Intake<'_>, Granted<'_>) {
        let granted = Granted::default();
        let grant = Rc::clone(&granted);
        let intake = Intake::new(max_bytes, move |outline| {
            let (keep, room) = self.admit(outline)?;
            *grant.borrow_mut() = Some(room);
            Ok(keep)
        });
        (intake, granted)
    }

    fn admit(&self, outline: &Outline) -> Result<(Keep, Room<'_>), CartridgeError> {
        let RegistryOptions { shape, device, dtype, max_positions, .. } = &self.options;
        check_shape(&outline.shape, shape)?;
        if outline.tokens >= *max_positions {
            let (size, limit) = (outline.tokens as u64, (*max_positions as u64).saturating_sub(1));
            return Err(CartridgeError::too_large("tokens", size, limit));
        }
        let bytes = outline.bytes_as(*dtype);
        let reserved = bytes.saturating_add(outline.scratch_bytes);
        let mut residents = self.lock();
        match residents.reserve(reserved) {
            Ok(()) => {
                let room = Reserved { registry: self, bytes: reserved };
                Ok((Keep::As(device.clone(), *dtype), Room::Reserved(room)))
            }
            // A second name of a resident, or a file read again: the digest tells, and needs no
            // room.
            Err(refused) if residents.resembles_one(outline, bytes) => {
                Ok((Keep::Nothing, Room::Refused(refused)))
            }
            Err(refused) => Err(refused),
        }
    }

    /// Makes resident what an intake took.
    pub(super) fn settle(
        &self,
        (generation, cartridge): (Generation, Option<Cartridge>),
        room: Option<Room<'_>>,
    ) -> Result<Arc<Cartridge>, CartridgeError> {
        let (cartridge, reserved) = match (cartridge, room) {
            (Some(cartridge), Some(Room::Reserved(reserved))) => (cartridge, reserved),
            (_, Some(Room::Refused(refused))) => {
                return self.lock().touch(generation).ok_or(refused);
            }
            _ => return Err(CartridgeError::invalid("its reader did not announce it")),
        };
        let RegistryOptions { model, rope_theta, rope_scaling, .. } = &self.options;
        let provenance = cartridge.provenance();
        for warning in provenance_warnings(provenance, model, *rope_theta, rope_scaling.as_ref()) {
            tracing::warn!(generation = generation.short(), "cartridge: {warning}");
        }
        let cartridge = cartridge.for_attention()?;
        let bytes = cartridge.bytes();
        let mut residents = self.lock();
        // Under one lock, so that nobody gets the room in between. Dropping it would lock again.
        residents.release(reserved.bytes);
        std::mem::forget(reserved);
        Ok(residents.publish(Arc::new(cartridge), bytes))
    }
}

/// Gives reserved room back if staging fails.
pub(super) struct Reserved<'a> {
    registry: &'a Registry,
    bytes: u64,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.registry.lock().release(self.bytes);
    }
}
