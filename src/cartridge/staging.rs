//! Staging: from an announced cartridge to a resident one. It is checked against the model and has
//! its room before any number of it is read.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use candle_core::Device;

use super::{
    Cartridge, CartridgeError, Generation, Intake, Keep, Outline, Registry, RegistryOptions,
    provenance_warnings, residents::Residents, validate::check_shape,
};
use crate::limits;

/// The room for a cartridge that is being read.
pub(super) enum Room<'a> {
    Reserved(Reserved<'a>),
    /// There was none.
    Refused(CartridgeError),
}

/// What becomes of a sound cartridge that there is no room for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum WithoutRoom {
    /// Nothing is read of it, unless it may be a resident under another name.
    Refuse,
    /// It is read and checked, but not kept.
    Check,
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

    /// An intake that admits what fits the model and has room, and the room it took. `without_room` says
    /// what happens to what fits the model and has none.
    pub(super) fn intake(
        &self,
        max_bytes: u64,
        without_room: WithoutRoom,
    ) -> (Intake<'_>, Granted<'_>) {
        let granted = Granted::default();
        let grant = Rc::clone(&granted);
        let intake = Intake::new(max_bytes, move |outline| {
            let (keep, room) = self.admit(outline, without_room)?;
            *grant.borrow_mut() = Some(room);
            Ok(keep)
        });
        (intake, granted)
    }

    fn admit(
        &self,
        outline: &Outline,
        without_room: WithoutRoom,
    ) -> Result<(Keep, Room<'_>), CartridgeError> {
        let RegistryOptions { shape, device, dtype, max_positions, .. } = &self.options;
        check_shape(&outline.shape, shape)?;
        if outline.tokens >= *max_positions {
            let (size, limit) = (outline.tokens as u64, (*max_positions as u64).saturating_sub(1));
            return Err(CartridgeError::too_large("tokens", size, limit));
        }
        let bytes = outline.bytes_as(*dtype);
        let reserved = self.reserve(bytes.saturating_add(outline.scratch_bytes));
        match (reserved, without_room) {
            (Ok(room), _) => Ok((Keep::As(device.clone(), *dtype), Room::Reserved(room))),
            // A second name of a resident, or a file read again: the digest tells, and needs no
            // room.
            (Err(refused), WithoutRoom::Refuse) if self.lock().resembles_one(outline, bytes) => {
                Ok((Keep::Nothing, Room::Refused(refused)))
            }
            (Err(refused @ CartridgeError::Busy { .. }), WithoutRoom::Check) => {
                Ok((Keep::Checked(device.clone(), *dtype), Room::Refused(refused)))
            }
            (Err(refused), _) => Err(refused),
        }
    }

    /// Room on the device. What has to leave it for that is copied to host memory first, if it has room
    /// there.
    pub(super) fn reserve(&self, bytes: u64) -> Result<Reserved<'_>, CartridgeError> {
        let leaving = self.lock().reserve(bytes)?;
        let room = Reserved { registry: self, bytes };
        let _surplus = Reserved { registry: self, bytes: leaving.surplus };
        let mut moves = Moves { registry: self, left: leaving.cartridges };
        while let Some(cartridge) = moves.left.last() {
            let (generation, dtype) = (cartridge.generation(), cartridge.dtype());
            let copy = cartridge.to(&Device::Cpu, dtype);
            if let Err(error) = &copy {
                let generation = generation.short();
                tracing::warn!(generation, "a cartridge could not be kept in host memory: {error}");
            }
            moves.left.pop();
            self.lock().leave(generation, copy.ok().map(Arc::new));
        }
        Ok(room)
    }

    /// Makes a resident of a copy in host memory.
    pub(super) fn restore(&self, copy: &Cartridge) -> Result<Arc<Cartridge>, CartridgeError> {
        let RegistryOptions { device, dtype, .. } = &self.options;
        let room = self.reserve(copy.bytes())?;
        let cartridge = copy.to(device, *dtype)?.for_attention()?;
        let bytes = cartridge.bytes();
        let mut residents = self.lock();
        room.give_to(&mut residents);
        residents.counts.restores += 1;
        let cartridge = residents.publish(Arc::new(cartridge), bytes);
        // Its name may have gone in the meantime.
        residents.retire_unnamed(cartridge.generation());
        Ok(cartridge)
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
        reserved.give_to(&mut residents);
        Ok(residents.publish(Arc::new(cartridge), bytes))
    }
}

/// Gives reserved room back if staging fails.
pub(super) struct Reserved<'a> {
    registry: &'a Registry,
    bytes: u64,
}

impl Reserved<'_> {
    /// Under one lock with what takes the room, so that nobody gets it in between.
    fn give_to(self, residents: &mut Residents) {
        residents.release(self.bytes);
        // Dropping it would lock again.
        std::mem::forget(self);
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.registry.lock().release(self.bytes);
    }
}

/// Evicted cartridges that were not copied yet; forgets them if that panics.
struct Moves<'a> {
    registry: &'a Registry,
    left: Vec<Arc<Cartridge>>,
}

impl Drop for Moves<'_> {
    fn drop(&mut self) {
        for cartridge in self.left.drain(..) {
            self.registry.lock().leave(cartridge.generation(), None);
        }
    }
}
