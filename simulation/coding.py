"""How a synthetic hospital's own names are coded in public vocabularies: ICD-10, RxNorm, LOINC with UCUM units, CVX.

The chart (`simulation.chart`) uses short local names, as a ward does; an extract for research carries standard codes.
Codes only, no descriptions of a licensed vocabulary: RxNorm is public domain, ICD-10-CM/PCS come from CMS, CVX from
CDC, LOINC codes and names are used under its licence (copyright Regenstrief Institute, https://loinc.org), UCUM units
likewise. No SNOMED CT code stands here.
"""

from dataclasses import dataclass

from simulation.chart import CONDITION_CODES, OTHER_CODES, REASONS
from simulation.pathway import INJURY

RXNORM: dict[str, str] = {
    "FUROSEMIDE": "4603",
    "ASPIRIN": "1191",
    "TIOTROPIUM": "69120",
    "SEVELAMER": "214824",
    "METFORMIN": "6809",
    "ONDANSETRON": "26225",
    "LACTULOSE": "6218",
    "DONEPEZIL": "135447",
    "HEPARIN": "5224",
    "METOPROLOL": "6918",
    "CEFTRIAXONE": "2193",
    "VANCOMYCIN": "11124",
    "CIPROFLOXACIN": "2551",
    "CEFAZOLIN": "2180",
    "OXYCODONE": "7804",
    "CISPLATIN": "2555",
    "NITROGLYCERIN": "4917",
    "LISINOPRIL": "29046",
    "IBUPROFEN": "5640",
}
"""RxNorm ingredient of each drug of the chart."""


@dataclass(frozen=True)
class Quantity:
    """A measured quantity: its LOINC code, its UCUM unit, and the decimals that a laboratory reports."""

    loinc: str
    unit: str
    decimals: int


QUANTITIES: dict[str, Quantity] = {
    "LAB//LACTATE//mmol/L": Quantity("2524-7", "mmol/L", 1),
    "LAB//CREATININE//mg/dL": Quantity("2160-0", "mg/dL", 2),
    "LAB//HEMOGLOBIN//g/dL": Quantity("718-7", "g/dL", 1),
    "LAB//WBC//10*3/uL": Quantity("6690-2", "10*3/uL", 1),
    "LAB//GLUCOSE//mg/dL": Quantity("2345-7", "mg/dL", 0),
    "LAB//NT-PROBNP//pg/mL": Quantity("33762-6", "pg/mL", 0),
    "LAB//TROPONIN-T//ng/mL": Quantity("6598-7", "ng/mL", 3),
    "LAB//ALBUMIN//g/dL": Quantity("1751-7", "g/dL", 1),
    "LAB//BILIRUBIN//mg/dL": Quantity("1975-2", "mg/dL", 1),
    "LAB//CREATININE//umol/L": Quantity("14682-9", "umol/L", 0),
    "LAB//GLUCOSE//mmol/L": Quantity("14749-6", "mmol/L", 1),
    "LAB//BILIRUBIN//umol/L": Quantity("14631-6", "umol/L", 1),
    "LAB//HEMOGLOBIN//g/L": Quantity("718-7", "g/L", 0),
    "VITAL//HEART_RATE//bpm": Quantity("8867-4", "/min", 0),
    "VITAL//SYSTOLIC_BP//mmHg": Quantity("8480-6", "mm[Hg]", 0),
    "VITAL//SPO2//%": Quantity("59408-5", "%", 0),
}
"""Each laboratory value and vital sign of the chart. Rounding keeps lactate inside the range that shows the acuity."""

DIAGNOSES = (*CONDITION_CODES, *REASONS, *OTHER_CODES, INJURY)
"""Every ICD-10-CM code of the chart."""

SYSTOLIC, BLOOD_PRESSURE = "8480-6", "85354-9"
"""LOINC: the systolic pressure, and the panel that FHIR puts it into as a component."""

TOBACCO = "72166-2"
TOBACCO_ANSWERS = ("LA18978-9", "LA15920-4", "LA18976-3")
"""LOINC: tobacco smoking status, with never, former and current daily smoker as coded answers."""

BLOOD_GROUP = "882-1"
BLOOD_GROUPS = ("O POS", "A POS", "B POS", "AB POS", "O NEG", "A NEG")
"""LOINC: ABO and Rh group, with its short text answers."""

INFLUENZA_VACCINE = "140"
"""CVX."""

PROCEDURES: dict[str, str] = {
    "I21.4": "027034Z",
    "K35.80": "0DTJ4ZZ",
    "S72.001A": "0SR90JZ",
    "M17.11": "0SRC0J9",
}
"""ICD-10-PCS operation for a reason of admission: stent, appendix, hip, knee."""

DEPARTMENTS: dict[str, str] = {
    "I21.4": "CARDIOLOGY",
    "I48.91": "CARDIOLOGY",
    "J18.9": "INTERNAL MEDICINE",
    "A41.9": "INTERNAL MEDICINE",
    "N39.0": "INTERNAL MEDICINE",
    "K35.80": "GENERAL SURGERY",
    "S72.001A": "ORTHOPEDICS",
    "M17.11": "ORTHOPEDICS",
    "C34.90": "ONCOLOGY",
    "R07.9": "CARDIOLOGY",
}
"""The ward that takes each reason of admission."""

INTENSIVE_CARE = "INTENSIVE CARE UNIT"
EMERGENCY_DEPARTMENT, CLINIC, ANY_WARD = "EMERGENCY DEPARTMENT", "OUTPATIENT CLINIC", "INTERNAL MEDICINE"
COMPLAINT = "8661-1"
COMPLAINTS: dict[str, str] = {
    "I21.4": "CHEST PAIN",
    "I48.91": "PALPITATIONS",
    "J18.9": "SHORTNESS OF BREATH",
    "A41.9": "FEVER",
    "N39.0": "PAINFUL URINATION",
    "K35.80": "ABDOMINAL PAIN",
    "S72.001A": "FALL",
    "M17.11": "KNEE PAIN",
    "C34.90": "COUGH",
    "R07.9": "CHEST PAIN",
}
"""What patients say in the emergency department, by the reason of the admission to come; LOINC: chief complaint."""

PLACES = tuple(dict.fromkeys([*DEPARTMENTS.values(), EMERGENCY_DEPARTMENT, CLINIC, INTENSIVE_CARE]))
EXPIRED = "EXPIRED"

RACES, RACE_SHARES = ("WHITE", "BLACK", "ASIAN"), (0.7, 0.2, 0.1)
HISPANIC_SHARE = 0.15
