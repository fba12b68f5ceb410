//! What a run keeps on disk, so that it can be killed at any moment and go on as if it had not been.
//!
//! | file in `run_dir` | holds |
//! |---|---|
//! | `packs.safetensors`, `eval-packs.safetensors` | the packs and the held-out ones, written once |
//! | `cache-step{N}.pt` | the cartridge after N updates |
//! | `state-step{N}.safetensors` | f32 master copies, the optimiser's means, where the run stands |
//! | `cache_last.pt` | link to the newest cartridge |
//!
//! Files are replaced as a whole. A step is saved once its state file is there; that comes last.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::DType;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::pack_file::PackFile;
use super::trainer::{Position, Trainer};
use super::{Pack, Targets, TrainError};
use crate::cartridge::{
    CartridgeError, Naming, Provenance, TorchStyle, write_atomically, write_torch,
};

/// Where [`Saved`] stands in the header of a state file.
const SAVED: &str = "saved";

#[derive(Serialize, Deserialize)]
struct Saved {
    position: Position,
    fingerprint: String,
}

/// The folder of a run.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: PathBuf,
    /// Checkpoints kept; 0 keeps all.
    keep_last_n: usize,
}

impl RunDir {
    /// Makes the folder if it is not there.
    pub fn open(path: &Path, keep_last_n: usize) -> Result<Self, TrainError> {
        std::fs::create_dir_all(path).map_err(|e| io("create the folder", path, e))?;
        Ok(Self { path: path.to_owned(), keep_last_n })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The packs of the run.
    pub fn packs(&self) -> PackFile {
        PackFile::new(self.path.join("packs.safetensors"))
    }

    /// Held-out packs, those only measured.
    pub fn eval_packs(&self) -> PackFile {
        PackFile::new(self.path.join("eval-packs.safetensors"))
    }

    /// Saves where `trainer` stands: the cartridge as `dtype`, then the state. Returns the cartridge's path.
    ///
    /// # Errors
    /// [`TrainError::Save`], e.g. on a full disk; what was saved before is as it was.
    pub fn save(
        &self,
        trainer: &Trainer,
        dtype: DType,
        facts: Provenance,
    ) -> Result<PathBuf, TrainError> {
        self.try_save(trainer, dtype, facts).map_err(|e| TrainError::Save {
            step: trainer.position.step,
            path: self.path.clone(),
            kept: self.saved_steps().ok().and_then(|mut steps| steps.pop()),
            source: Box::new(e),
        })
    }

    fn try_save(
        &self,
        trainer: &Trainer,
        dtype: DType,
        facts: Provenance,
    ) -> Result<PathBuf, TrainError> {
        let step = trainer.position.step;
        let name = format!("cache-step{step}.pt");
        let path = self.path.join(&name);
        let cartridge = trainer.parameters.cartridge(dtype, facts)?;
        write_torch(&path, &cartridge, TorchStyle::default(), Naming::default())?;
        let groups = [
            ("parameter", trainer.parameters.tensors()),
            ("first", &trainer.adam.first),
            ("second", &trainer.adam.second),
        ];
        let tensors = groups.iter().flat_map(|(name, tensors)| {
            tensors.iter().enumerate().map(move |(i, tensor)| {
                (format!("{name}.{i}"), Dtype::F32, bytemuck::cast_slice(tensor))
            })
        });
        // One entry: the order of several would differ from file to file.
        let saved =
            Saved { position: trainer.position, fingerprint: trainer.fingerprint().to_owned() };
        let saved =
            serde_json::to_string(&saved).map_err(|e| TrainError::Invalid(e.to_string()))?;
        let facts = HashMap::from([(SAVED.to_owned(), saved)]);
        write_tensors(&self.state_path(step), tensors.collect(), facts)?;
        self.link_last(&name)?;
        self.forget_old()?;
        Ok(path)
    }

    /// Puts `trainer` where the newest saved step was. False when nothing was saved.
    ///
    /// # Errors
    /// [`TrainError::Resume`] when the run was begun with other options, packs or another model.
    pub fn resume(&self, trainer: &mut Trainer) -> Result<bool, TrainError> {
        let Some(step) = self.saved_steps()?.pop() else { return Ok(false) };
        let path = self.state_path(step);
        let bytes = std::fs::read(&path).map_err(|e| io("read", &path, e))?;
        let broken = |reason: &str| resume(&path, reason);
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| broken(&e.to_string()))?;
        let saved: Saved = header
            .metadata()
            .as_ref()
            .and_then(|facts| serde_json::from_str(facts.get(SAVED)?).ok())
            .ok_or_else(|| broken("it does not say where the run stood"))?;
        if saved.fingerprint != trainer.fingerprint() {
            return Err(broken(
                "it was begun with other options, data or another model. The same are needed to go on",
            ));
        }
        let position = saved.position;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| broken(&e.to_string()))?;
        let read = |name: &str, into: &mut [Vec<f32>]| -> Result<(), TrainError> {
            for (i, into) in into.iter_mut().enumerate() {
                let tensor =
                    file.tensor(&format!("{name}.{i}")).map_err(|e| broken(&e.to_string()))?;
                let values = numbers(tensor.data(), f32::from_le_bytes);
                if values.len() != into.len() {
                    return Err(broken("its tensors have other shapes"));
                }
                *into = values;
            }
            Ok(())
        };
        let (mut parameters, mut adam) = (trainer.parameters.clone(), trainer.adam.clone());
        read("parameter", parameters.tensors_mut())?;
        read("first", &mut adam.first)?;
        read("second", &mut adam.second)?;
        adam.step = position.step;
        (trainer.parameters, trainer.adam, trainer.position) = (parameters, adam, position);
        Ok(true)
    }

    /// Steps whose state is on disk, in ascending order.
    pub fn saved_steps(&self) -> Result<Vec<u64>, TrainError> {
        let entries = std::fs::read_dir(&self.path).map_err(|e| io("list", &self.path, e))?;
        let step = |name: String| {
            name.strip_prefix("state-step")?.strip_suffix(".safetensors")?.parse().ok()
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut steps: Vec<u64> = names.filter_map(step).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    fn forget_old(&self) -> Result<(), TrainError> {
        let steps = self.saved_steps()?;
        if self.keep_last_n == 0 || steps.len() <= self.keep_last_n {
            return Ok(());
        }
        for step in &steps[..steps.len() - self.keep_last_n] {
            // The state first: a cartridge without it is only a file too many.
            for path in [self.state_path(*step), self.path.join(format!("cache-step{step}.pt"))] {
                match std::fs::remove_file(&path) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        return Err(io("remove", &path, e));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn link_last(&self, name: &str) -> Result<(), TrainError> {
        let last = self.path.join("cache_last.pt");
        let temporary = self.path.join(".cache_last.tmp");
        let _ = std::fs::remove_file(&temporary); // left by a run that was killed here
        #[cfg(unix)]
        let made = std::os::unix::fs::symlink(name, &temporary);
        #[cfg(not(unix))]
        let made = std::fs::copy(self.path.join(name), &temporary).map(drop);
        made.and_then(|()| std::fs::rename(&temporary, &last)).map_err(|e| io("link", &last, e))
    }

    fn state_path(&self, step: u64) -> PathBuf {
        self.path.join(format!("state-step{step}.safetensors"))
    }
}

/// Writes a file of one-dimensional tensors, as a whole.
pub(super) fn write_tensors(
    path: &Path,
    tensors: Vec<(String, Dtype, &[u8])>,
    facts: HashMap<String, String>,
) -> Result<(), TrainError> {
    let invalid = |e: safetensors::SafeTensorError| TrainError::Invalid(e.to_string());
    let views = tensors
        .into_iter()
        .map(|(name, dtype, bytes)| {
            let len = bytes.len() / size_of::<f32>();
            TensorView::new(dtype, vec![len], bytes).map(|view| (name, view))
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(invalid)?;
    let bytes = serialize(views, Some(facts)).map_err(invalid)?;
    let failed = |e| CartridgeError::io("write the file", &e);
    Ok(write_atomically(path, |file| file.write_all(&bytes).map_err(failed))?)
}

/// Digest of packs, as part of what a run is known by.
pub(super) fn digest_of(packs: &[Pack], digest: &mut Sha256) {
    for pack in packs {
        let Targets { rows, ids, probs } = &pack.targets;
        for part in [&pack.tokens, &pack.cu_seqlens, rows, ids] {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(bytemuck::cast_slice::<u32, u8>(part));
        }
        digest.update(bytemuck::cast_slice::<f32, u8>(probs));
    }
}

/// The numbers of a tensor, which may lie anywhere in the file.
pub(super) fn numbers<T>(bytes: &[u8], number: fn([u8; 4]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|bytes| number(*bytes)).collect()
}

pub(super) fn resume(path: &Path, reason: &str) -> TrainError {
    TrainError::Resume { path: path.to_owned(), reason: reason.to_owned() }
}

pub(super) fn io(action: &'static str, path: &Path, source: std::io::Error) -> TrainError {
    TrainError::Io { action, path: path.to_owned(), source }
}
