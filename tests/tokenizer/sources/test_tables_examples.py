"""The mappings that are shipped, and the example in the documentation, do what they say."""

import gzip
import re
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from tests.tokenizer.sources.site import events_of, write
from tokenizer.sources.mapping import read_mapping
from tokenizer.sources.subjects import SubjectIds
from tokenizer.sources.tables import import_tables

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples/sources"
PUBLISHED = Path("/work/shared/data/physionet2012_set-a.tar.gz")
PUBLISHED_MEDS = Path("/work/shared/data/physionet2012_set-a_meds")


def test_the_example_in_the_documentation_gives_what_stands_there(tmp_path):
    page = (ROOT / "docs/sources/tables.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", page, re.M | re.S))
    for name, text in files.items():
        write(tmp_path / "site" / name, text)
    flow = import_tables(tmp_path / "site", tmp_path / "out", tmp_path / "site/mapping.toml", name="site")
    names = ["A-1", "A-2", "A-3"]
    ids = dict(zip(SubjectIds().of(pl.Series(names)), names, strict=True))
    lines = []
    for row in events_of(tmp_path / "out").iter_rows(named=True):
        value = None if row["numeric_value"] is None else round(row["numeric_value"], 4)
        shown = " ".join(str(part) for part in (row["code"], value, row["unit"]) if part is not None)
        lines.append(f"{ids[row['subject_id']]:<4} {row['time'] or ''!s:<19} {shown}")
    assert sorted(lines) == files["events.txt"].splitlines()
    counts = []
    for table, rows in sorted(flow.rows.items()):
        dropped = ", ".join(f"{name}: {n}" for name, n in sorted(flow.dropped.get(table, {}).items()))
        counts.append(f"{table} {rows} {flow.kept[table]} {dropped}".rstrip())
    assert counts == files["flow.txt"].splitlines()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_mapping_is_valid(path):
    assert read_mapping(path).table


PATIENT_1 = """Time,Parameter,Value
00:00,RecordID,132539
00:00,Age,54
00:00,Gender,0
00:00,Height,-1
00:00,ICUType,4
00:00,Weight,-1
00:07,GCS,15
36:37,Temp,35.1
"""
PATIENT_2 = PATIENT_1.replace("132539", "132540").replace("Gender,0", "Gender,-1").replace("Weight,-1", "Weight,76")
OUTCOMES = """RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death
132539,6,1,5,-1,0
132540,16,8,8,8,1
132541,-1,-1,-1,-1,0
"""


def physionet(folder):
    write(folder / "set-a/132539.txt", PATIENT_1)
    write(folder / "set-a/132540.txt", PATIENT_2)
    write(folder / "Outcomes-a.txt", OUTCOMES)


def test_physionet_2012_in_small(tmp_path):
    physionet(tmp_path / "site")
    flow = import_tables(tmp_path / "site", tmp_path / "out", EXAMPLES / "physionet2012.toml", name="p")
    events = events_of(tmp_path / "out").filter(pl.col("subject_id") == 132539)
    assert events.select("time", "code", "numeric_value").rows() == [
        (None, "GENDER//0", None),
        (None, "ICUTYPE//4", None),
        (datetime(1956, 1, 2), "MEDS_BIRTH", None),
        (datetime(2010, 1, 1), "ICU_ADMISSION", None),
        (datetime(2010, 1, 1, 0, 7), "LAB//GCS", 15.0),
        (datetime(2010, 1, 2, 12, 37), "LAB//Temp", pytest.approx(35.1)),
        (datetime(2010, 1, 6), "HOSPITAL_DISCHARGE", None),
    ]
    assert flow.dropped == {
        "stays": {"height": 2, "no value": 1, "nothing to tell": 1},
        "outcomes": {"nothing to tell": 1},
    }
    assert flow.kept == {"stays": 12, "outcomes": 2}


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published archive of PhysioNet 2012 is not on this machine")
def test_physionet_2012_as_published_equals_its_meds_form(tmp_path):
    flow = import_tables(PUBLISHED, tmp_path / "out", EXAMPLES / "physionet2012.toml", name="p")
    columns = ["subject_id", "time", "code", "numeric_value"]
    ours, theirs = (events_of(path).select(columns).sort(columns) for path in (tmp_path / "out", PUBLISHED_MEDS))
    assert ours.height == 1_678_503
    assert ours.equals(theirs)
    assert flow.subjects == 4000
    assert int((ours["code"] == "MEDS_DEATH").sum()) == 554
    assert flow.dropped == {
        "stays": {"height": 4000, "no value": 326, "nothing to tell": 3},
        "outcomes": {"nothing to tell": 60},
    }


EICU = {
    "patient.csv.gz": (
        "patientunitstayid,patienthealthsystemstayid,gender,age,ethnicity,hospitalid,apacheadmissiondx,admissionheight,"
        "hospitaladmittime24,hospitaladmitoffset,hospitaladmitsource,hospitaldischargeyear,hospitaldischargeoffset,"
        "hospitaldischargelocation,hospitaldischargestatus,unittype,admissionweight,unitdischargeoffset,"
        "unitdischargelocation,uniquepid\n"
        '141168,128919,Female,70,Caucasian,59,"Rhythm disturbance (atrial, supraventricular)",152.4,15:54:00,0,'
        "Direct Admit,2015,3596,Death,Expired,Med-Surg ICU,84.3,3596,Death,002-34851\n"
        "141178,128927,Female,> 89,Hispanic,60,,,08:56:00,-14,Emergency Department,2015,2050,Home,Alive,"
        "Med-Surg ICU,54.2,8,Step-Down Unit (SDU),002-33870\n"
        "141179,128927,Female,> 89,Hispanic,60,,,08:56:00,-22,Emergency Department,2015,2042,Home,Alive,"
        "CCU-CTICU,54.2,1500,Home,002-33870\n"
    ),
    "vitalPeriodic.csv.gz": (
        "vitalperiodicid,patientunitstayid,observationoffset,temperature,sao2,heartrate,respiration,cvp,etco2,"
        "systemicsystolic,systemicdiastolic,systemicmean,pasystolic,padiastolic,pamean,st1,st2,st3,icp\n"
        "1,141168,119,,93,140,,,,,,,,,,,,,\n2,141178,-5,37.1,,,,,,,,,,,,,,,\n3,141178,0,,,,,,,,,,,,,,,,\n"
    ),
    "lab.csv.gz": (
        "labid,patientunitstayid,labresultoffset,labtypeid,labname,labresult,labresulttext,labmeasurenamesystem\n"
        "1,141168,516,1,potassium,4,4,mmol/L\n2,141168,516,4,HIV 1&2 AB,,negative,\n"
    ),
    "medication.csv.gz": (
        "medicationid,patientunitstayid,drugstartoffset,drugordercancelled,drugname,drughiclseqno\n"
        "1,141168,10,No,aspirin,1820\n2,141168,10,Yes,aspirin,1820\n3,141168,10,No,,2734\n4,141168,10,No,,\n"
    ),
    "infusionDrug.csv.gz": (
        "infusiondrugid,patientunitstayid,infusionoffset,drugname,drugrate\n1,141168,20,Heparin (units/hr),1000\n"
        "2,141168,30,Heparin (units/hr),OFF\n"
    ),
}


def test_eicu_in_small(tmp_path):
    for name, text in EICU.items():
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / name).write_bytes(gzip.compress(text.encode()))
    flow = import_tables(tmp_path / "site", tmp_path / "out", EXAMPLES / "eicu.toml", name="e")
    events = events_of(tmp_path / "out")
    dead, old = (
        events.filter(pl.col("subject_id") == subject).select("time", "code", "numeric_value", "encounter_id").rows()
        for subject in SubjectIds().of(pl.Series(["002-34851", "002-33870"]))
    )
    start = datetime(2015, 1, 1, 15, 54)
    assert dead == [
        (None, "GENDER//F", None, "128919"),
        (None, "RACE//WHITE", None, "128919"),
        (datetime(1945, 1, 1, 15, 54), "MEDS_BIRTH", None, "128919"),
        (start, "ADMISSION_SOURCE//DIRECT ADMIT", None, "128919"),
        (start, "CHIEF_COMPLAINT//RHYTHM DISTURBANCE (ATRIAL, SUPRAVENTRICULAR)", None, "128919"),
        (start, "DEPARTMENT//MED-SURG ICU", None, "128919"),
        (start, "ENCOUNTER_START//INPATIENT", None, "128919"),
        (start, "HEIGHT", pytest.approx(152.4), "128919"),
        (start, "WEIGHT", pytest.approx(84.3), "128919"),
        (datetime(2015, 1, 1, 16, 4), "DRUG//ASPIRIN", None, "128919"),
        (datetime(2015, 1, 1, 16, 4), "DRUG//HICL-2734", None, "128919"),
        (datetime(2015, 1, 1, 16, 14), "INFUSION//HEPARIN (UNITS/HR)", 1000.0, "128919"),
        (datetime(2015, 1, 1, 16, 24), "INFUSION//HEPARIN (UNITS/HR)//OFF", None, "128919"),
        (datetime(2015, 1, 1, 17, 53), "VITAL//heartrate", 140.0, "128919"),
        (datetime(2015, 1, 1, 17, 53), "VITAL//sao2", 93.0, "128919"),
        (datetime(2015, 1, 2, 0, 30), "LAB//HIV 1&2 AB//NEGATIVE", None, "128919"),
        (datetime(2015, 1, 2, 0, 30), "LAB//POTASSIUM", 4.0, "128919"),
        (datetime(2015, 1, 4, 3, 50), "DISCHARGE_TO//DEATH", None, "128919"),
        (datetime(2015, 1, 4, 3, 50), "ENCOUNTER_END//INPATIENT", None, "128919"),
        (datetime(2015, 1, 4, 3, 50), "ICU_DISCHARGE//DEATH", None, "128919"),
        (datetime(2015, 1, 4, 3, 50), "MEDS_DEATH", None, "128919"),
    ]
    codes = [code for _, code, _, _ in old]
    # Two stays in units, one in hospital.
    assert codes.count("ENCOUNTER_START//INPATIENT") == codes.count("MEDS_BIRTH") == codes.count("GENDER//F") == 1
    assert [time for time, code, _, _ in old if code.startswith("DEPARTMENT")] == [
        datetime(2015, 1, 1, 9, 10),
        datetime(2015, 1, 1, 9, 18),
    ]
    assert (datetime(2015, 1, 1, 9, 5), "VITAL//temperature", pytest.approx(37.1), "128927") in old
    assert (datetime(1925, 1, 1, 8, 56), "MEDS_BIRTH", None, "128927") in old
    assert flow.dropped["medication"] == {"cancelled order": 1, "nothing to tell": 1}
    assert flow.dropped["vitalPeriodic"] == {"no value": 1}
    assert any("vitalAperiodic" in note for note in flow.notes)


MIMIC = {
    "hosp/patients.csv": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod\n"
    "10000032,F,52,2180,2014 - 2016,2180-09-09\n10000048,M,30,2126,2008 - 2010,2130-01-02\n",
    "hosp/admissions.csv": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admission_location,"
    "discharge_location,race,edregtime,edouttime,hospital_expire_flag\n"
    "10000032,22595853,2180-05-06 22:23:00,2180-05-07 17:15:00,,URGENT,TRANSFER FROM HOSPITAL,HOME,WHITE,"
    "2180-05-06 19:17:00,2180-05-06 23:30:00,0\n"
    "10000048,23052089,2130-01-01 08:00:00,2130-01-02 09:00:00,2130-01-02 08:59:00,EW EMER.,,DIED,WHITE,,,1\n",
    "hosp/transfers.csv": "subject_id,hadm_id,transfer_id,eventtype,careunit,intime,outtime\n"
    "10000032,22595853,1,admit,Medicine,2180-05-06 23:30:00,2180-05-07 17:15:00\n"
    "10000032,22595853,2,discharge,,2180-05-07 17:15:00,\n",
    "hosp/diagnoses_icd.csv": "subject_id,hadm_id,seq_num,icd_code,icd_version\n"
    "10000032,22595853,1,5723,9\n10000032,22595853,2,E8798,9\n10000048,23052089,1,E1165,10\n10000048,23052089,2,I10,10\n",
    "hosp/procedures_icd.csv": "subject_id,hadm_id,seq_num,chartdate,icd_code,icd_version\n"
    "10000032,22595853,1,2180-05-07,5491,9\n10000048,23052089,1,2130-01-01,0DTJ4ZZ,10\n",
    "hosp/labevents.csv": "labevent_id,subject_id,hadm_id,itemid,charttime,value,valuenum,valueuom,comments\n"
    '1,10000032,22595853,50868,2180-05-07 05:05:00,12,12,mEq/L,"one\nand ""two"" lines"\n'
    "2,10000032,,51519,2180-05-07 05:05:00,NEG,,,\n3,10000032,,51519,2180-05-07 05:05:00,___,,,\n",
    "hosp/prescriptions.csv": "subject_id,hadm_id,starttime,drug,ndc\n"
    "10000032,22595853,2180-05-07 00:00:00,Furosemide,51079007320\n"
    "10000032,22595853,2180-05-07 00:00:00,Sodium Chloride 0.9%  Flush,0\n10000032,22595853,,Heparin,63323026201\n",
}


def test_mimic_iv_in_small(tmp_path):
    for name, text in MIMIC.items():
        write(tmp_path / "site" / name, text)
    flow = import_tables(tmp_path / "site", tmp_path / "out", EXAMPLES / "mimic-iv.toml", name="m")
    events = events_of(tmp_path / "out")
    of = {
        subject: events.filter(pl.col("subject_id") == subject).select("time", "code", "numeric_value").rows()
        for subject in (10000032, 10000048)
    }
    end = datetime(2180, 5, 7, 17, 15)
    assert {row for row in of[10000032] if row[0] == end} == {
        (end, "DISCHARGE_TO//HOME", None),
        (end, "ENCOUNTER_END//INPATIENT", None),
        (end, "ICD9CM//572.3", None),
        (end, "ICD9CM//E879.8", None),
    }
    assert (datetime(2128, 1, 1), "MEDS_BIRTH", None) in of[10000032]
    assert (datetime(2180, 9, 9), "MEDS_DEATH", None) in of[10000032]
    assert (datetime(2180, 5, 7), "ICD9Proc//54.91", None) in of[10000032]
    assert (datetime(2180, 5, 7), "NDC//51079007320", None) in of[10000032]
    assert (datetime(2180, 5, 7), "PRESCRIPTION//SODIUM CHLORIDE 0.9%  FLUSH", None) in of[10000032]
    assert (datetime(2180, 5, 7, 5, 5), "LAB//51519//NEG", None) in of[10000032]
    assert (datetime(2180, 5, 6, 19, 17), "ENCOUNTER_START//EMERGENCY", None) in of[10000032]
    deaths = [row for row in of[10000048] if row[1] == "MEDS_DEATH"]
    assert deaths == [(datetime(2130, 1, 2, 8, 59), "MEDS_DEATH", None)]
    assert {code for _, code, _ in of[10000048]} >= {"ICD10CM//E11.65", "ICD10CM//I10", "ICD10PCS//0DTJ4ZZ"}
    assert flow.dropped["labevents"] == {"no value": 1}
    assert flow.dropped["prescriptions"] == {"nothing to tell": 1}
    assert flow.dropped["transfers"] == {"discharge": 1}
