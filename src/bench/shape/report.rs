//! One row per figure: as a line of CSV and as a line for a terminal.

use std::path::Path;

use serde::Serialize;

use crate::bench::BenchError;
use crate::bench::files::cell;
use crate::bench::table::number;

/// A figure, or why there is none. The members are the columns of the CSV, in order; what does not apply is
/// empty.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub device: String,
    pub dtype: String,
    pub shape: String,
    /// Layers that were measured, and those of the whole model. No figure is extrapolated.
    pub layers: usize,
    pub of_layers: usize,
    /// What lengths were divided by.
    pub scale: usize,
    /// Of a layer's attention.
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub what: &'static str,
    /// `name=value` pairs.
    pub case: String,
    /// The shortest time by the measured roofs: the larger of bytes over the copy's rate and operations over
    /// the product's.
    pub predicted_ms: Option<f64>,
    /// Median of `runs`.
    pub measured_ms: Option<f64>,
    pub min_ms: Option<f64>,
    pub max_ms: Option<f64>,
    pub runs: Option<usize>,
    /// That must be moved.
    pub bytes: u64,
    pub flops: u64,
    /// Which roof the prediction is under.
    pub bound: Option<&'static str>,
    /// Predicted over measured.
    pub roof_fraction: Option<f64>,
    pub gb_per_s: Option<f64>,
    pub tflop_per_s: Option<f64>,
    pub sequences: Option<usize>,
    pub tokens_per_s: Option<f64>,
    /// To what the note says, and the same of the predictions.
    pub ratio: Option<f64>,
    pub ratio_predicted: Option<f64>,
    /// What the process or the device held more at its peak than before.
    pub peak_mib: Option<f64>,
    pub note: String,
}

/// The columns, as [`csv`] has them.
pub fn header(row: &Row) -> String {
    let row = serde_json::to_value(row).unwrap_or_default();
    let names = row.as_object().into_iter().flat_map(|row| row.keys());
    names.map(String::as_str).collect::<Vec<_>>().join(",")
}

/// The row as a line.
pub fn csv(row: &Row) -> String {
    let row = serde_json::to_value(row).unwrap_or_default();
    let cells = row.as_object().into_iter().flat_map(|row| row.values());
    cells.map(cell).collect::<Vec<_>>().join(",")
}

/// Writes all rows to `shape.csv` in `folder`, which is made if need be.
///
/// # Errors
/// [`BenchError::Io`] names the file.
pub fn write(folder: &Path, rows: &[Row]) -> Result<(), BenchError> {
    let Some(first) = rows.first() else { return Ok(()) };
    let io = |path: &Path| {
        let path = path.to_owned();
        |source| BenchError::Io { path, source }
    };
    std::fs::create_dir_all(folder).map_err(io(folder))?;
    let lines = std::iter::once(header(first)).chain(rows.iter().map(csv));
    let text = lines.map(|line| line + "\n").collect::<String>();
    let path = folder.join("shape.csv");
    std::fs::write(&path, text).map_err(io(&path))
}

/// What stands over [`line`]s.
pub fn heading() -> String {
    format!(
        "{:<10} {:<52} {:>9} {:>9} {:>7} {:>5} {:>8} {:>8} {:>10}",
        "", "", "predicted", "measured", "of roof", "bound", "GB/s", "TFLOP/s", "tokens/s"
    )
}

/// The row for a terminal; times are in ms.
pub fn line(row: &Row) -> String {
    let percent = row.roof_fraction.map_or("-".to_owned(), |f| format!("{:.0} %", 100.0 * f));
    let mut line = format!(
        "{:<10} {:<52} {:>9} {:>9} {:>7} {:>5} {:>8} {:>8} {:>10}",
        row.what,
        row.case,
        number(row.predicted_ms),
        number(row.measured_ms),
        percent,
        row.bound.unwrap_or("-"),
        number(row.gb_per_s),
        number(row.tflop_per_s),
        number(row.tokens_per_s),
    );
    if let Some(predicted) = row.ratio_predicted {
        line += &format!("  {} times (predicted {predicted:.2})", number(row.ratio));
    }
    if let Some(peak) = row.peak_mib {
        line += &format!("  peak {peak:.0} MiB");
    }
    if !row.note.is_empty() {
        line += &format!("  {}", row.note);
    }
    line
}
