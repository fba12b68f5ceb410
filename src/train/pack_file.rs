//! Packs on disk: made once, so that a resumed run learns from, and is measured by, the very same ones
//! without asking the teacher again.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors};

use super::checkpoint::{io, numbers, resume, write_tensors};
use super::{Pack, Targets, TrainError};

/// Where the file says what its packs were made of.
const SOURCE: &str = "source";

/// The lists of integers of a file, those of all packs joined.
const INTEGERS: [&str; 6] = ["sizes", "tokens", "cu_seqlens", "rows", "ids", "dataset_rows"];

/// A file of packs.
#[derive(Debug, Clone)]
pub struct PackFile {
    path: PathBuf,
}

impl PackFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether packs were made before.
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// `source` stands for everything they were made of; [`Self::check_source`] compares it.
    pub fn write(&self, packs: &[Pack], source: &str) -> Result<(), TrainError> {
        let joined = |f: &dyn Fn(&Pack) -> &[u32]| -> Vec<u32> {
            packs.iter().flat_map(|pack| f(pack).iter().copied()).collect()
        };
        let sizes: Vec<u32> = packs.iter().flat_map(sizes).collect();
        let probs: Vec<f32> = packs.iter().flat_map(|p| p.targets.probs.iter().copied()).collect();
        let integers = [
            sizes,
            joined(&|pack| &pack.tokens),
            joined(&|pack| &pack.cu_seqlens),
            joined(&|pack| &pack.targets.rows),
            joined(&|pack| &pack.targets.ids),
            joined(&|pack| &pack.dataset_rows),
        ];
        let mut tensors: Vec<(String, Dtype, &[u8])> = INTEGERS
            .iter()
            .zip(&integers)
            .map(|(name, values)| ((*name).to_owned(), Dtype::U32, bytemuck::cast_slice(values)))
            .collect();
        tensors.push(("probs".to_owned(), Dtype::F32, bytemuck::cast_slice(&probs)));
        let facts = HashMap::from([(SOURCE.to_owned(), source.to_owned())]);
        write_tensors(&self.path, tensors, facts)
    }

    /// # Errors
    /// [`TrainError::Resume`] when the packs that lie here were made of something else.
    pub fn check_source(&self, source: &str) -> Result<(), TrainError> {
        let bytes = self.bytes()?;
        let (_, header) =
            SafeTensors::read_metadata(&bytes).map_err(|e| resume(&self.path, &e.to_string()))?;
        let made_of = header.metadata().as_ref().and_then(|facts| facts.get(SOURCE));
        match made_of.is_some_and(|made_of| made_of == source) {
            true => Ok(()),
            false => Err(resume(
                &self.path,
                "it was made of another document, other conversations or other options of the data",
            )),
        }
    }

    /// # Errors
    /// [`TrainError::Resume`] for a file that is damaged.
    pub fn read(&self) -> Result<Vec<Pack>, TrainError> {
        let bytes = self.bytes()?;
        let broken = |reason: &str| resume(&self.path, reason);
        let file = SafeTensors::deserialize(&bytes).map_err(|e| broken(&e.to_string()))?;
        let mut parts = HashMap::new();
        for name in INTEGERS {
            let tensor = file.tensor(name).map_err(|e| broken(&e.to_string()))?;
            parts.insert(name, numbers(tensor.data(), u32::from_le_bytes).into_iter());
        }
        let probs = file.tensor("probs").map_err(|e| broken(&e.to_string()))?;
        let mut probs = numbers(probs.data(), f32::from_le_bytes).into_iter();
        let sizes: Vec<u32> = parts.remove("sizes").into_iter().flatten().collect();
        let mut take = |name: &str, len: u32| -> Result<Vec<u32>, TrainError> {
            let values = parts.get_mut(name).into_iter().flatten().take(len as usize);
            let values: Vec<u32> = values.collect();
            if values.len() == len as usize { Ok(values) } else { Err(broken("it is cut short")) }
        };
        sizes
            .chunks_exact(4)
            .map(|size| {
                let probs: Vec<f32> = probs.by_ref().take(size[2] as usize).collect();
                let rows = take("rows", size[2])?;
                if probs.len() != rows.len() {
                    return Err(broken("it is cut short"));
                }
                Ok(Pack {
                    tokens: take("tokens", size[0])?,
                    cu_seqlens: take("cu_seqlens", size[1])?,
                    targets: Targets { rows, ids: take("ids", size[2])?, probs },
                    dataset_rows: take("dataset_rows", size[3])?,
                })
            })
            .collect()
    }

    fn bytes(&self) -> Result<Vec<u8>, TrainError> {
        std::fs::read(&self.path).map_err(|e| io("read", &self.path, e))
    }
}

/// How many numbers of each list are the pack's.
fn sizes(pack: &Pack) -> [u32; 4] {
    let lists =
        [pack.tokens.len(), pack.cu_seqlens.len(), pack.targets.len(), pack.dataset_rows.len()];
    lists.map(|len| len as u32)
}
