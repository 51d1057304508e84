//! The plots for the documentation.

use std::path::Path;

use plotters::prelude::*;

use crate::{Measured, retention::Sample};

const SIZE: (u32, u32) = (900, 420);

/// What it is called, its colour, and what it shows.
type Line = (&'static str, RGBColor, fn(&Sample) -> f64);

/// Sizes of the tables over time.
pub(crate) fn sizes(path: &Path, samples: &[Sample]) -> Measured<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let end = samples.last().map_or(1.0, |s| s.minute);
    let most = samples
        .iter()
        .map(|s| s.log.max(s.rest))
        .fold(1.0, f64::max);
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..end, 0.0..most * 1.15)?;
    chart
        .configure_mesh()
        .x_desc("minutes")
        .y_desc("MiB")
        .light_line_style(WHITE)
        .draw()?;
    let lines: [Line; 2] = [
        ("log", RGBColor(31, 119, 180), |s| s.log),
        (
            "all other tables of the engine",
            RGBColor(214, 90, 20),
            |s| s.rest,
        ),
    ];
    for (name, color, of) in lines {
        let line = samples.iter().map(|s| (s.minute, of(s)));
        chart
            .draw_series(LineSeries::new(line, color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}
